"""tokenizer.py's script."""

from lab.check_tokenizer import check_tokenizer
from lab.command import Parser


def main(tokenizer_class):
    parser = Parser(description="Shows the tokens of a text, one per line.")
    parser.add_argument("dir", help="a directory with a tokenizer.json")
    parser.add_argument("text")
    args = parser.parse_args()
    with parser.one_line_errors():
        check_tokenizer(args.dir)
        tokenizer = tokenizer_class(args.dir)
        for id in tokenizer.encode(args.text):
            print(id, tokenizer.encoding.decode_single_token_bytes(id))
