(() => {
  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  // What is shown; a link such as report.html#set=1&kind=worst opens there.
  const choice = { set: "0", direction: "text_to_visual", kind: "best" };
  const asked = new URLSearchParams(location.hash.slice(1));
  const select = document.getElementById("set");
  const groups = [...document.querySelectorAll(".segments")];

  const show = () => {
    select.value = choice.set;
    for (const group of groups) {
      for (const button of group.children) {
        button.setAttribute("aria-pressed", button.value === choice[group.dataset.choice]);
      }
    }
    for (const panel of document.querySelectorAll(".panel")) {
      panel.hidden = !Object.entries(choice).every(([key, value]) => panel.dataset[key] === value);
      if (panel.hidden) continue;
      for (const image of panel.querySelectorAll("img[data-picture]:not([src])")) {
        image.src = pictures[image.dataset.picture];
      }
    }
  };
  const choose = (key, value) => {
    choice[key] = value;
    history.replaceState(null, "", "#" + new URLSearchParams(choice));
    show();
  };

  for (const key of Object.keys(choice)) {
    const value = asked.get(key);
    if (document.querySelector(`.panel[data-${key}="${CSS.escape(value || "")}"]`)) choice[key] = value;
  }
  select.addEventListener("change", () => choose("set", select.value));
  for (const group of groups) {
    group.addEventListener("click", (event) => {
      if (event.target.value) choose(group.dataset.choice, event.target.value);
    });
  }
  document.documentElement.classList.add("live");
  show();
})();
