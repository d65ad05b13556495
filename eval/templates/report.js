(() => {
  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  // What is shown; a link such as report.html#set=1&kind=worst opens there.
  const choice = { set: "0", direction: "text_to_visual", kind: "best" };
  const select = document.getElementById("set");
  const groups = [...document.querySelectorAll(".segments")];
  const panels = [...document.querySelectorAll(".panel")];

  const offered = (key) => new Set(panels.filter((p) => p.dataset.set === choice.set).map((p) => p.dataset[key]));
  const show = () => {
    select.value = choice.set;
    for (const group of groups) {
      const key = group.dataset.choice;
      const values = offered(key);
      if (!values.has(choice[key])) choice[key] = [...values][0];
      group.hidden = values.size < 2;
      for (const button of group.children) {
        button.hidden = !values.has(button.value);
        button.setAttribute("aria-pressed", button.value === choice[key]);
      }
    }
    for (const panel of panels) {
      panel.hidden = !Object.entries(choice).every(([key, value]) => panel.dataset[key] === value);
      if (panel.hidden) continue;
      for (const image of panel.querySelectorAll("img[data-picture]:not([src])")) {
        image.src = pictures[image.dataset.picture];
      }
    }
  };
  const choose = (key, value) => {
    choice[key] = value;
    show();
    history.replaceState(null, "", "#" + new URLSearchParams(choice));
  };

  const asked = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(choice)) {
    if (asked.has(key) && (key !== "set" || select.options[asked.get(key)])) choice[key] = asked.get(key);
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
