// Two things a page of cards needs: a slider through training, and a filter by reward. Without this script all cards are shown.
for (const box of document.querySelectorAll(".watched")) {
  const [problem, step, label] = ["select", "input", "output"].map(tag => box.querySelector(tag));
  const cards = [...box.querySelectorAll("article")];
  const show = () => {
    const mine = cards.filter(card => card.dataset.problem === problem.value);
    step.max = mine.length - 1;
    cards.forEach(card => card.hidden = true);
    mine[step.value].hidden = false;
    label.textContent = "step " + mine[step.value].dataset.step;
  };
  problem.addEventListener("change", show);
  step.addEventListener("input", show);
  box.querySelector(".controls").hidden = false;
  show();
}
for (const box of document.querySelectorAll(".filtered")) {
  const choice = box.querySelector("select"), count = box.querySelector("output"), cards = [...box.querySelectorAll("article")];
  choice.addEventListener("change", () => {
    const [name, full] = choice.value.split(" ");
    cards.forEach(card => card.hidden = name && (card.dataset["r" + name] === "1") !== (full === "1"));
    count.textContent = cards.filter(card => !card.hidden).length + " of " + cards.length;
  });
  box.querySelector(".controls").hidden = false;
}
