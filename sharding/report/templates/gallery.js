(() => {
  const samples = [...document.querySelectorAll(".sample")];
  const words = samples.map((sample) => sample.textContent.toLowerCase());
  const search = document.getElementById("search");
  const count = document.getElementById("count");
  const dialog = document.querySelector("dialog");

  const filter = () => {
    const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    samples.forEach((sample, number) => {
      sample.hidden = !asked.every((word) => words[number].includes(word));
      shown += !sample.hidden;
    });
    count.textContent = asked.length ? `${shown} of ${samples.length}` : "";
  };
  search.addEventListener("input", filter);

  for (const button of document.querySelectorAll("button.view")) {
    button.addEventListener("click", () => {
      const image = button.querySelector("img").cloneNode();
      const clip = button.classList.contains("clip");
      image.className = clip ? "wide" : "";
      const box = document.createElement("div");
      box.className = clip ? "scroll" : "";
      box.append(image);
      const text = document.createElement("p");
      text.textContent = button.closest(".sample").querySelector(".text p")?.textContent ?? "";
      dialog.replaceChildren(box, text);
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", () => dialog.close());
  document.documentElement.classList.add("live");
  filter();
})();
