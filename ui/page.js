() => {
  // The scheme is the system's until somebody switches it; the choice is kept in this browser.
  const chosen = localStorage.getItem("ether-studio-scheme");
  if (chosen) document.body.classList.toggle("dark", chosen === "dark");
  // What a visitor has touched is theirs: nothing that was kept is put over it.
  const touched = new Set();
  const touch = ({ target }) => { for (let node = target; node; node = node.parentElement) touched.add(node.id); };
  for (const kind of ["input", "keydown", "pointerdown"]) addEventListener(kind, touch, true);
  const first = {};
  window.etherStudio = {
    switchScheme() {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("ether-studio-scheme", dark ? "dark" : "light");
    },
    // Give the values of fields that a form had, and undefined for those that are to be left as they are.
    restore(form, kept, fields) {
      const found = (first[form] ??= kept ?? {});
      const isOther = found.base !== document.querySelector("#heading [data-base]")?.dataset.base;
      return fields.map(({ name, id, is_of_base, value, minimum, maximum, step }) => {
        const was = found[name];
        const isNumber = typeof was === "number";
        const isAlike = value === null ? typeof was === "string" || isNumber : typeof was === typeof value && Array.isArray(was) === Array.isArray(value);
        const isNone = isNumber && (!Number.isFinite(was) || (Number.isInteger(step) && (was % step || (step > 1 && was <= 0))));
        if (!isAlike || isNone || touched.has(id) || (is_of_base && isOther)) return undefined;
        const ends = typeof maximum === "number" ? { minimum: Math.min(minimum, was), maximum: Math.max(maximum, was) } : {};
        return { __type__: "update", value: was, ...ends };
      });
    },
  };
  // The studio knows by this whose jobs are whose, also when the page is loaded anew.
  if (!document.cookie.includes("ether-studio=")) {
    const name = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    document.cookie = `ether-studio=${name}; path=/; max-age=31536000; SameSite=Strict`;
  }
  document.documentElement.lang = "en";
  // Gradio leaves the button around a picture without a name.
  const name = () => {
    for (const button of document.querySelectorAll(".image-container > button:not([aria-label])")) {
      button.setAttribute("aria-label", "Picture");
    }
  };
  // The pixels of pictures as small as the embedded base's stay sharp when they are enlarged.
  const sharpen = (image) => { image.style.imageRendering = 0 < image.naturalWidth && image.naturalWidth <= 128 ? "pixelated" : ""; };
  document.addEventListener("load", ({ target }) => { if (target.tagName === "IMG") sharpen(target); }, true);
  // Another base was opened, here or by somebody else: every form begins anew.
  let base = null;
  const look = () => {
    name();
    for (const image of document.images) if (image.complete) sharpen(image);
    const now = document.querySelector("#heading [data-base]")?.dataset.base;
    if (base && now && now !== base) location.reload();
    base = now ?? base;
  };
  new MutationObserver(look).observe(document.body, { childList: true, subtree: true, attributeFilter: ["data-base"] });
  look();
  // Arrow keys move between tabs, and the tab that was open is opened again.
  const tabs = () => [...document.querySelectorAll('#tabs button[role="tab"]')].filter((tab) => tab.offsetParent);
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const at = step ? tabs().indexOf(event.target) : -1;
    if (at < 0) return;
    const next = tabs()[(at + step + tabs().length) % tabs().length];
    next.focus();
    next.click();
  });
  addEventListener("pagehide", () => {
    const open = tabs().find((tab) => tab.ariaSelected === "true");
    if (open) sessionStorage.setItem("ether-studio-tab", open.innerText.trim());
  });
  tabs().find((tab) => tab.innerText.trim() === sessionStorage.getItem("ether-studio-tab"))?.click();
  // A server that has ended is said; the page loads itself anew when it answers again.
  let misses = 0;
  const ask = async () => {
    const answers = await fetch("gradio_api/app_id", { cache: "no-store" }).then(() => true, () => false);
    if (answers && misses > 1) location.reload();
    misses = answers ? 0 : misses + 1;
    if (misses !== 2) return;
    const said = Object.assign(document.createElement("p"), { id: "gone", role: "alert" });
    said.textContent = "The studio does not answer: it was ended, or the connection is gone. Runs of training go on; pictures that were being drawn are to be drawn again. This page comes back by itself.";
    document.body.append(said);
  };
  setInterval(ask, 3000);
  // Ctrl+Enter draws from any field of the open tab.
  document.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.key !== "Enter") return;
    const go = [...document.querySelectorAll(".go-column button.primary")].find((button) => button.offsetParent);
    if (go) { event.preventDefault(); go.click(); }
  });
}
