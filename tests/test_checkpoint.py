"""A state comes back bit for bit, a kill at any moment leaves whole files, and a signal lets the step be finished."""

import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import model
import pretend_cuda
from forked import run_forked, start_forked
from lab import checkpoint
from lab.checkpoint import (STATE, Checkpointer, Terminated, append_jsonl, atomic_write, file_hash, finished, load,
                            mark_finished, read_jsonl, restore, save, save_directory, state_of, write_jsonl)

ROOT = Path(__file__).parent.parent


class Tied(nn.Module):
    """As small language models are: the head is the embedding; a buffer that lasts and one that does not."""

    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.middle = nn.Linear(width, width)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, ids):
        self.seen += 1
        return self.head(self.middle(self.embedding(ids)).relu())


def start(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    model = Tied().to(dtype)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95)), torch.Generator().manual_seed(seed)


def steps(model, optimizer, generator, first, last):
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        ids = torch.randint(11, (4, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_resumes_bit_for_bit_where_it_stopped(dtype, tmp_path):
    through = start(0, dtype)
    steps(*through, 0, 9)

    model, optimizer, generator = start(0, dtype)
    steps(model, optimizer, generator, 0, 4)
    save(tmp_path, *state_of(model=model, optimizer=optimizer, generator=generator, step=4, best=[0.1, None]))
    model, optimizer, generator = start(1, dtype)  # another process: other weights, other random numbers
    rest = restore(*load(tmp_path), model=model, optimizer=optimizer, generator=generator)
    assert rest == {"step": 4, "best": [0.1, None]}
    steps(model, optimizer, generator, rest["step"], 9)

    for one, other in zip(through[0].state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(through[2].get_state(), generator.get_state())
    ours, theirs = optimizer.state_dict(), through[1].state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for i, moments in theirs["state"].items():
        for name, value in moments.items():
            assert torch.equal(ours["state"][i][name], value) and ours["state"][i][name].dtype == value.dtype


def test_a_state_before_the_first_step_can_be_saved(tmp_path):
    model, optimizer, generator = start(0)
    save(tmp_path, *state_of(model=model, optimizer=optimizer, generator=generator))
    assert restore(*load(tmp_path), model=model, optimizer=optimizer, generator=generator) == {}


def test_modules_with_similar_names_and_loose_tensors_are_not_mixed_up(tmp_path):
    policy, critic = Tied(), Tied()
    save(tmp_path, *state_of(model=policy, model_b=critic, mean=torch.tensor(2.5), order=torch.arange(4), note="小明"))
    other, another = Tied(), Tied()
    rest = restore(*load(tmp_path), model=other, model_b=another)
    assert torch.equal(other.middle.weight, policy.middle.weight)
    assert torch.equal(another.middle.weight, critic.middle.weight)
    assert rest["mean"].item() == 2.5 and rest["order"].tolist() == [0, 1, 2, 3] and rest["note"] == "小明"


def test_tied_weights_stay_tied_and_the_optimizer_keeps_its_parameters(tmp_path):
    model, optimizer, _ = start(0)
    save(tmp_path, *state_of(model=model))
    restore(*load(tmp_path), model=model)
    assert model.head.weight is model.embedding.weight is optimizer.param_groups[0]["params"][0]


def test_restoring_does_not_tie_the_model_to_what_was_loaded(tmp_path):
    model, optimizer, generator = start(0)
    steps(model, optimizer, generator, 0, 2)
    save(tmp_path, *state_of(model=model, optimizer=optimizer))
    tensors, meta = load(tmp_path)
    before = {name: t.clone() for name, t in tensors.items()}
    restore(tensors, meta, model=model, optimizer=optimizer)
    steps(model, optimizer, generator, 2, 4)
    assert all(torch.equal(t, tensors[name]) for name, t in before.items())


@pytest.mark.parametrize("culprit, parts", [
    ("model.embedding.weight is (11, 8) torch.float32 in the training state, (11, 16) torch.float32 in the model",
     {"model": Tied(16)}),
    ("model.embedding.weight is (11, 8) torch.float32 in the training state, (11, 8) torch.bfloat16 in the model",
     {"model": Tied().bfloat16()}),
    ("model.0.bias is missing in the training state", {"model": nn.ModuleList([nn.Linear(2, 2)])}),
    ("holds no optimizer", {"optimizer": torch.optim.AdamW(Tied().parameters())}),
])
def test_a_state_of_something_else_is_refused_by_name(culprit, parts, tmp_path):
    save(tmp_path, *state_of(model=Tied()))
    with pytest.raises(ValueError) as caught:
        restore(*load(tmp_path), **parts)
    assert culprit in str(caught.value)


def test_there_is_no_state_before_the_first_save(tmp_path):
    assert load(tmp_path) is None and load(tmp_path / "absent") is None and finished(tmp_path) is None


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_state_is_named_and_left_as_it_is(keep, tmp_path):
    save(tmp_path, *state_of(model=Tied(), step=1))
    path = tmp_path / STATE
    left = path.read_bytes()[:keep]
    path.write_bytes(left)
    with pytest.raises(ValueError, match="state.safetensors: not a whole training state.*from the beginning") as caught:
        load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == left


def test_a_weights_file_without_counters_is_not_taken_for_a_state(tmp_path):
    from safetensors.torch import save_file
    save_file({"w": torch.zeros(2)}, tmp_path / STATE)
    with pytest.raises(ValueError, match="state.safetensors"):
        load(tmp_path)


def test_a_save_that_fails_leaves_the_state_before_it(tmp_path):
    save(tmp_path, {"w": torch.ones(3)}, {"step": 1})
    with pytest.raises(TypeError):
        save(tmp_path, {"w": torch.zeros(3)}, {"step": object()})
    assert load(tmp_path)[1] == {"step": 1}


def test_no_file_is_a_pickle(tmp_path):
    save(tmp_path, *state_of(model=Tied(), step=1))
    header = (tmp_path / STATE).read_bytes()[8:]
    assert json.JSONDecoder().raw_decode(header.decode("latin-1"))[0]["__metadata__"]["meta"] == '{"step": 1}'
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
def test_safetensors_reads_the_file_of_a_state(dtype, tmp_path):
    tensors = {"b.matrix": torch.arange(6).view(2, 3).to(dtype), "a": torch.ones((), dtype=dtype),
               "none": torch.zeros(0, 3, dtype=dtype), "turned": torch.arange(6).view(2, 3).to(dtype).t(),
               "bytes": torch.arange(3, dtype=torch.uint8)}  # after it nothing would be aligned
    save(tmp_path, tensors, {"step": 1})
    found = load_file(tmp_path / STATE)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert (int.from_bytes((tmp_path / STATE).read_bytes()[:8], "little") + 8) % 8 == 0


def most_memory_of(run):
    """By how many bytes this process grows meanwhile: without mapped files, which the system can take back."""
    def now():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    def watch():
        while not over:
            seen.append(now())
            time.sleep(0.001)

    over, seen = [], [now()]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        over.append(True)
        watcher.join()
    return max(seen) - seen[0]


def save_and_resume_on_a_gpu(folder):
    pretend_cuda.install()

    def make():
        layers = nn.ModuleList([nn.Linear(512, 512, bias=False) for _ in range(32)]).cuda()
        return layers, torch.optim.Adam(layers.parameters(), fused=True)

    (layers, optimizer), (others, its_optimizer) = make(), make()
    count = sum(p.numel() for p in layers.parameters())
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert most_memory_of(lambda: save(folder, *state_of(model=layers, optimizer=optimizer))) < 2 * count  # of 12
    state = load(folder)
    # the moments lie on the pretended GPU then, 8 bytes a parameter of the same memory
    assert most_memory_of(lambda: restore(*state, model=others, optimizer=its_optimizer)) < 10 * count
    p, other = layers[3].weight, others[3].weight
    assert torch.equal(p, other) and torch.equal(optimizer.state[p]["exp_avg"], its_optimizer.state[other]["exp_avg"])
    assert its_optimizer.state[other]["step"].is_cuda


def test_a_state_of_a_gpu_passes_through_the_cpus_memory_tensor_by_tensor(tmp_path):
    ended = run_forked(save_and_resume_on_a_gpu, tmp_path)
    assert ended.status == 0, ended.stderr


def save_and_resume_on_a_cpu(folder):
    def make():
        layers = nn.ModuleList([nn.Linear(512, 512, bias=False) for _ in range(32)])
        return layers, torch.optim.Adam(layers.parameters(), fused=True)

    (layers, optimizer), (others, its_optimizer) = make(), make()
    count, resumed = sum(p.numel() for p in layers.parameters()), []
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    save(folder, *state_of(model=layers, optimizer=optimizer, step=1))

    def resume():
        with Checkpointer(folder) as checkpointer:
            resumed.append(checkpointer.resume(model=others, optimizer=its_optimizer))
    assert 7.5 * count < most_memory_of(resume) < 8.5 * count and resumed == [{"step": 1}]
    assert torch.equal(its_optimizer.state[others[3].weight]["exp_avg"], optimizer.state[layers[3].weight]["exp_avg"])


def test_a_resumption_on_a_cpu_takes_the_moments_once(tmp_path):
    """8 bytes a parameter, which stay: the file is mapped, not read, and nothing is copied twice."""
    ended = run_forked(save_and_resume_on_a_cpu, tmp_path)
    assert ended.status == 0, ended.stderr


def test_a_restored_moment_does_not_lie_in_the_file(tmp_path):
    """Adam writes to it, and the file is replaced."""
    made, optimizer, generator = start(1)
    steps(made, optimizer, generator, 0, 2)
    save(tmp_path, *state_of(model=made, optimizer=optimizer))
    tensors, meta = load(tmp_path)
    restore(tensors, meta, model=made, optimizer=optimizer)
    moment, = (optimizer.state[p]["exp_avg"] for p in [made.embedding.weight])
    assert moment.untyped_storage().data_ptr() != tensors["optimizer.0.exp_avg"].untyped_storage().data_ptr()


# ---- killed at any point

def write_for_ever(dir):
    step = 0
    while True:
        step += 1
        save(dir, {"w": torch.full((300_000,), float(step))}, {"step": step})
        append_jsonl(dir / "metrics.jsonl", {"step": step, "text": "x" * 50_000})
        mark_finished(dir, {"step": step, "text": "x" * 50_000})
        if step == 1:
            print("ready", flush=True)


def test_a_process_killed_at_any_moment_leaves_a_whole_state(tmp_path):
    rows_before = 0
    for delay in (0.02, 0.2):
        with start_forked(write_for_ever, tmp_path) as writer:
            while writer.stdout != "ready\n":
                assert writer.poll() is None, writer.stderr
                time.sleep(0.001)
            time.sleep(delay)
            writer.kill()
            assert writer.wait().status == -signal.SIGKILL
        tensors, meta = load(tmp_path)
        assert tensors["w"].shape == (300_000,) and (tensors["w"] == meta["step"]).all()
        rows = read_jsonl(tmp_path / "metrics.jsonl")[rows_before:]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert len(rows) in (meta["step"] - 1, meta["step"])
        assert finished(tmp_path)["step"] in (meta["step"] - 1, meta["step"])
        rows_before += len(rows)


def write_much_for_ever(dir, kind):
    config = model.Config(vocab_size=5000, hidden_size=512, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=1, num_key_value_heads=1)
    big = model.Transformer(config)
    while True:
        if kind == "model":
            save_directory(dir, partial(model.save, big))
        else:
            save(dir, *state_of(big=big))


@pytest.mark.parametrize("kind, wanted", [("model", ["config.json", "generation_config.json", "model.safetensors"]),
                                          ("state", [STATE])])
def test_what_a_writer_left_that_was_killed_within_a_file_goes_with_the_next_save(kind, wanted, tiny, tmp_path):
    """safetensors 0.8 writes to a hidden file with a random name: each would leave one, as large as the weights."""
    def is_within_a_file():  # each name can be gone while it is looked at
        for folder, _, names in os.walk(tmp_path):
            for name in names:
                if not name.endswith(".json") and (name not in wanted or folder != str(tmp_path)):
                    return True
        return False

    for _ in range(50):
        with start_forked(write_much_for_ever, tmp_path, kind) as writer:
            while not is_within_a_file():
                assert writer.poll() is None, writer.stderr
            writer.kill()
            writer.wait()
        if is_within_a_file():
            break
    assert is_within_a_file()
    if kind == "model":
        save_directory(tmp_path, partial(model.save, tiny()))
    else:
        save(tmp_path, {"w": torch.zeros(2)}, {"step": 0})
    assert sorted(path.name for path in tmp_path.iterdir()) == wanted
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # who may read one may read all


def write_text(dir, number):
    atomic_write(dir / "file", str(number))


def read_text(dir):
    return int((dir / "file").read_text())


def write_state(dir, number):
    save(dir, {"w": torch.full((2,), float(number))}, {"step": number})


def read_state(dir):
    tensors, meta = load(dir)
    assert tensors["w"].tolist() == [float(meta["step"])] * 2
    return meta["step"]


@pytest.mark.parametrize("write, read", [(write_text, read_text), (write_state, read_state)])
def test_whatever_part_of_a_write_is_done_when_it_stops_the_name_holds_a_whole_file(write, read, tmp_path, monkeypatch):
    """Stops before each of the calls that bring a file into place, as a kill would."""
    class Killed(BaseException):
        pass
    parts = 3  # the file is flushed, renamed, and its folder is flushed
    write(tmp_path, 0)
    there = sorted(tmp_path.iterdir())
    for stopped_at in range(parts):
        write(tmp_path, 0)
        calls = iter(range(parts))

        def stop_or(do):
            def call(*args):
                if next(calls) == stopped_at:
                    raise Killed
                return do(*args)
            return call
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_flush", stop_or(checkpoint._flush))
            patch.setattr(checkpoint.os, "replace", stop_or(checkpoint.os.replace))
            with pytest.raises(Killed):
                write(tmp_path, 1)
        assert read(tmp_path) == (stopped_at == parts - 1)
    write(tmp_path, 0)
    assert next(calls, None) is None and sorted(tmp_path.iterdir()) == there


# ---- rows and markers

ROWS = [{"step": 1, "text": "a\nb\u2028c"}, {"step": 2, "text": "苹果"}]


def test_rows_come_back_as_they_were(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    for row in ROWS:
        append_jsonl(tmp_path / "new" / "b.jsonl", row)
    assert read_jsonl(tmp_path / "a.jsonl") == read_jsonl(tmp_path / "new" / "b.jsonl") == ROWS
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "new" / "b.jsonl").read_bytes()


def test_a_last_line_cut_anywhere_is_ignored_and_the_next_row_stands_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        lines = [json.loads(line) for line in whole[:cut + 1].split(b"\n")[:-1]]  # whole even if its line end is cut
        assert read_jsonl(path) == lines
        append_jsonl(path, {"step": 3})
        assert read_jsonl(path) == lines + [{"step": 3}]


def test_a_wrong_line_that_is_not_the_last_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match="rows.jsonl:2"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_done_holds_what_made_the_stage(tmp_path):
    source = tmp_path / "sft.py"
    source.write_text("lr = 1\n")
    mark_finished(tmp_path, {"settings": {"lr": 1e-4}, "code": file_hash(source)})
    assert finished(tmp_path) == {"settings": {"lr": 1e-4}, "code": file_hash(source)}
    source.write_text("lr = 2\n")
    assert finished(tmp_path)["code"] != file_hash(source)


def test_a_broken_marker_is_named(tmp_path):
    (tmp_path / checkpoint.DONE).write_text("{")
    with pytest.raises(ValueError, match="DONE: not JSON"):
        finished(tmp_path)


def test_an_optimizer_of_another_kind_and_a_schedulers_keys_come_back():
    def make():
        net = torch.nn.Linear(3, 2)
        optimizer = torch.optim.NAdam(net.parameters())
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step(), scheduler.step()
        return net, optimizer
    (net, optimizer), (_, other) = make(), make()
    other.param_groups[0]["initial_lr"] = 7.0
    restore(*state_of(model=net, optimizer=optimizer, step=1), optimizer=other)
    assert other.param_groups[0]["initial_lr"] == optimizer.param_groups[0]["initial_lr"] != 7.0
    assert torch.equal(*(o.state_dict()["state"][0]["mu_product"] for o in (optimizer, other)))


def test_a_setting_that_is_missing_in_one_is_the_difference(tmp_path):
    checkpoint.check_same_settings(tmp_path / "settings.json", {"a": 1, "b": None})
    with pytest.raises(ValueError, match="b was None, is None"):
        checkpoint.check_same_settings(tmp_path / "settings.json", {"a": 1})


def test_the_first_setting_that_differs_is_named_by_its_path(tmp_path):
    checkpoint.check_same_settings(tmp_path / "settings.json", {"rl": {"lr": 0.1, "rates": (1, 2)}, "seed": 0})
    checkpoint.check_same_settings(tmp_path / "settings.json", {"rl": {"lr": 0.1, "rates": [1, 2]}, "seed": 0})
    with pytest.raises(ValueError, match="another configuration .rl.lr was 0.1, is 0.2."):
        checkpoint.check_same_settings(tmp_path / "settings.json", {"rl": {"lr": 0.2, "rates": [1, 2]}, "seed": 1})


def test_a_mask_of_minus_infinity_is_no_sign_of_a_broken_model(tmp_path):
    net = torch.nn.Linear(3, 2)
    net.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    checkpointer = Checkpointer(tmp_path, every=0.0)
    checkpointer.began -= 1000
    assert checkpointer.save(model=net, step=1)
    with torch.no_grad():
        net.weight[0, 0] = float("nan")
    checkpointer.began -= 1000
    assert not checkpointer.save(model=net, step=2) and load(tmp_path)[1]["step"] == 1


def test_sampled_rows_that_are_not_those_of_the_state_are_refused_and_not_drawn_again(tmp_path):
    path, generator = tmp_path / "rows.jsonl", torch.Generator().manual_seed(0)
    checkpointer = Checkpointer(tmp_path, ["rows.jsonl"])

    def save_at_once(**parts):
        checkpointer._save(parts, at_once=True)

    def resumed_rows():
        return checkpoint.kept_rows(path, generator, None, Checkpointer(tmp_path, ["rows.jsonl"]).resume)[0]

    _, log = checkpoint.kept_rows(path, generator, save_at_once, None)
    log({"step": 1}), log({"step": 2})
    for rows in ([{"step": 1}], [], [{"step": 2}], [{"step": 1}] * 2):
        write_jsonl(path, rows)
        with pytest.raises(ValueError, match="rows.jsonl: not the 2 rows of the state"):
            resumed_rows()
    write_jsonl(path, [{"step": 1}, {"step": 2}, {"step": 3}])
    assert resumed_rows() == [{"step": 1}, {"step": 2}]


def test_a_file_that_was_written_at_once_has_no_unfinished_line(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert read_jsonl(tmp_path / "rows.jsonl", whole=True) == ROWS
    (tmp_path / "rows.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes()[:-3])
    with pytest.raises(ValueError, match="rows.jsonl:2: the last line is cut off"):
        read_jsonl(tmp_path / "rows.jsonl", whole=True)


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tiny, tmp_path):
    from tokenizer import Tokenizer
    (tmp_path / "else").write_text("mine")
    (tmp_path / "dir").mkdir()
    for name in ("file.tmp", "saving.tmp"):
        (tmp_path / "dir" / name).symlink_to(tmp_path / "else")
    atomic_write(tmp_path / "dir" / "file", "new")
    save_directory(tmp_path / "dir", partial(model.save, tiny(), tokenizer=Tokenizer(ROOT / "data")))
    assert (tmp_path / "else").read_text() == "mine" and not [*(tmp_path / "dir").glob("*.tmp")]
    assert (tmp_path / "dir" / "tokenizer.json").is_file() and not (tmp_path / "dir" / "tokenizer.json").is_symlink()


# ---- signals

SIGNALS = pytest.mark.parametrize("number, stop, name", [(signal.SIGINT, KeyboardInterrupt, "Ctrl-C"),
                                                         (signal.SIGTERM, Terminated, "SIGTERM")])


@pytest.fixture(autouse=True)
def signals_are_heard():
    """Also where the tests run in the background of a shell, which ignores Ctrl-C there."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for number, handler in before.items():
        signal.signal(number, handler)


def press(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs between two instructions


def train(checkpointer, steps, signals):
    """`signals` {step: number} come within their steps; returns the steps that were made."""
    made = []
    first = checkpointer.resume()["step"] if checkpointer.resume else 0
    for step in range(first + 1, steps + 1):
        if step in signals:
            press(signals[step])
        append_jsonl(checkpointer.dir / "metrics.jsonl", {"step": step})
        made.append(step)
        checkpointer.save(step=step, tensor=torch.zeros(1))
    return made


@SIGNALS
def test_the_first_signal_finishes_the_step_and_saves_and_the_next_call_resumes(number, stop, name, tmp_path, capfd):
    with pytest.raises(stop) as caught:
        with Checkpointer(tmp_path, ["metrics.jsonl"]) as checkpointer:
            train(checkpointer, 10, {3: number})
    assert type(caught.value) is stop and load(tmp_path)[1]["step"] == 3
    said = capfd.readouterr().err
    assert f"{name}: stopping once the current step is finished and saved" in said and said.count("\n") == 2
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 4})  # of a step that the state does not know
    with Checkpointer(tmp_path, ["metrics.jsonl"]) as checkpointer:
        assert train(checkpointer, 10, {}) == [4, 5, 6, 7, 8, 9, 10]
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [*range(1, 11)]


@SIGNALS
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(first, number, stop, name, tmp_path):
    with pytest.raises(stop) as caught:
        with Checkpointer(tmp_path) as checkpointer:
            press(first)
            assert checkpointer.stop is not None
            press(number)
            time.sleep(5)
    assert type(caught.value) is stop and not (tmp_path / STATE).exists()


@SIGNALS
def test_a_signal_after_the_last_save_is_not_swallowed(number, stop, name, tmp_path):
    with pytest.raises(stop):
        with Checkpointer(tmp_path):
            press(number)


@SIGNALS
def test_a_signal_while_the_state_is_written_stops_after_the_next_step(number, stop, name, tmp_path):
    checkpointer = Checkpointer(tmp_path, every=0.0, after=lambda: press(number))
    checkpointer.began -= 1000
    with pytest.raises(stop), checkpointer:
        assert checkpointer.save(step=1)
        checkpointer.after = None
        checkpointer.save(step=2)
    assert load(tmp_path)[1]["step"] == 2


def test_sigterm_outside_of_a_training_raises_at_once_and_within_one_when_the_step_is_saved(tmp_path):
    with pytest.raises(Terminated), checkpoint.hear_sigterm():
        press(signal.SIGTERM)
        time.sleep(5)
    with checkpoint.hear_sigterm():
        with pytest.raises(Terminated), Checkpointer(tmp_path, ["metrics.jsonl"]) as checkpointer:
            train(checkpointer, 10, {2: signal.SIGTERM})
        assert load(tmp_path)[1]["step"] == 2
        with pytest.raises(Terminated):  # the outer handler is back
            press(signal.SIGTERM)
            time.sleep(5)


def test_a_signal_that_a_shell_ignores_in_the_background_stays_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Checkpointer(tmp_path):
        press(signal.SIGINT)
    assert signal.signal(signal.SIGINT, signal.default_int_handler) == signal.SIG_IGN


@SIGNALS
def test_a_process_that_gets_a_signal_ends_with_its_state_saved(number, stop, name, tmp_path):
    def train_for_ever():
        try:
            with Checkpointer(tmp_path, ["metrics.jsonl"]) as checkpointer:
                train(checkpointer, 10 ** 9, {})
        except KeyboardInterrupt as caught:
            raise SystemExit(143 if isinstance(caught, Terminated) else 130)

    with start_forked(train_for_ever) as child:
        while not (tmp_path / "metrics.jsonl").exists():
            assert child.poll() is None, child.stderr
            time.sleep(0.01)
        child.kill(number)
        assert child.wait(30).status == (143 if stop is Terminated else 130)
    assert load(tmp_path)[1]["step"] == len(read_jsonl(tmp_path / "metrics.jsonl"))
