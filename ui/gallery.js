// The thumbnails of History: tells which picture was clicked and which are chosen; keys press the buttons of
// the picture on show, which is marked.
let last = null;
const boxes = () => [...element.querySelectorAll("input[data-choose]")];
// a box that was pressed keeps its state when the page is given others
watch("value", () => boxes().forEach((box) => { box.checked = box.hasAttribute("checked"); }));
const chosen = () => boxes().filter((box) => box.checked).map((box) => box.dataset.choose);
element.addEventListener("click", (event) => {
  const picture = event.target.closest("[data-picture]");
  if (picture) trigger("click", { picture: picture.dataset.picture });
  const box = event.target.closest("input[data-choose]");
  if (!box) return;
  const all = boxes(), before = all.findIndex((each) => each.dataset.choose === last);
  const [from, to] = [before, all.indexOf(box)].sort((one, other) => one - other);
  if (event.shiftKey && from >= 0) for (const each of all.slice(from, to + 1)) each.checked = box.checked;
  last = box.dataset.choose;
  trigger("select", { chosen: chosen() });
});
const keys = { ArrowLeft: "previous", ArrowRight: "next", Escape: "close", Delete: "delete", s: "star" };
document.addEventListener("keydown", (event) => {
  const inField = event.target.closest("input:not([type=checkbox]), textarea, [role=tab], [role=listbox]");
  const name = keys[event.key];
  if (!name || inField || event.ctrlKey || event.metaKey || event.altKey || !element.offsetParent) return;
  const button = document.getElementById(`history-${name}`);
  if (button?.offsetParent && !button.disabled) { event.preventDefault(); button.click(); }
});
// The picture on show is marked among the others, which are not sent anew for it.
new MutationObserver(() => {
  const shown = document.querySelector("#history-facts [data-shown]")?.dataset.shown;
  for (const each of element.querySelectorAll("[data-picture]")) {
    if (each.dataset.picture === shown) each.setAttribute("aria-current", "true");
    else each.removeAttribute("aria-current");
  }
}).observe(document.body, { childList: true, subtree: true, attributeFilter: ["data-shown"] });
