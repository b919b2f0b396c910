() => {
  // The scheme is the system's until somebody switches it; the choice is kept in this browser.
  const chosen = localStorage.getItem("ether-studio-scheme");
  if (chosen) document.body.classList.toggle("dark", chosen === "dark");
  window.etherStudio = {
    switchScheme() {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("ether-studio-scheme", dark ? "dark" : "light");
    },
  };
  document.documentElement.lang = "en";
  // Gradio leaves the button around a picture without a name.
  const name = () => {
    for (const button of document.querySelectorAll(".image-container > button:not([aria-label])")) {
      button.setAttribute("aria-label", "Picture");
    }
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
  // Ctrl+Enter draws from any field of the open tab.
  document.addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.key !== "Enter") return;
    const go = [...document.querySelectorAll(".go-column button.primary")].find((button) => button.offsetParent);
    if (go) { event.preventDefault(); go.click(); }
  });
}
