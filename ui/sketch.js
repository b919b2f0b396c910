// A canvas of exact colours without smooth edges, in a gr.HTML; element and watch are Gradio's.
let live = null;
const start = () => {
  const box = element.querySelector(".sketch");
  if (!box) return;
  live?.abort(); // Gradio may keep the nodes when the value changes, and with them who listens
  live = new AbortController();
  const listening = { signal: live.signal };
  const canvas = box.querySelector("canvas");
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const { width, height } = canvas;
  const key = `ether-studio-sketch-${box.dataset.paper}`;
  const past = [];
  let last = null;
  pen.imageSmoothingEnabled = false;
  for (const radio of box.querySelectorAll("input[type=radio]")) radio.name = `class-of-${element.closest("[id]").id}`; // of one canvas alone

  const colour = () => box.querySelector("input[type=radio]:checked").value;
  const radius = () => Math.max(0.6, (box.querySelector("input[type=range]").value / 200) * Math.min(width, height));
  const fill = (shade) => { pen.fillStyle = shade; pen.fillRect(0, 0, width, height); };
  const keep = () => { if ("drawn" in box.dataset) return; try { localStorage.setItem(key, canvas.toDataURL("image/png")); } catch { /* full */ } };
  const remember = () => {
    past.push(pen.getImageData(0, 0, width, height));
    if (past.length > 20) past.shift();
  };
  const place = (event) => {
    const seen = canvas.getBoundingClientRect();
    return { x: ((event.clientX - seen.left) / seen.width) * width, y: ((event.clientY - seen.top) / seen.height) * height };
  };
  // Whole pixels row by row: arcs of a canvas would have smooth edges, in colours of no class.
  const dot = ({ x, y }, r) => {
    pen.fillRect(Math.floor(x), Math.floor(y), 1, 1);
    for (let row = Math.floor(y - r); row <= Math.ceil(y + r); row++) {
      const reach = r * r - (row + 0.5 - y) ** 2;
      if (reach <= 0) continue;
      const from = Math.round(x - Math.sqrt(reach));
      pen.fillRect(from, row, Math.round(x + Math.sqrt(reach)) - from, 1);
    }
  };
  const stroke = (to) => {
    const r = radius();
    const steps = Math.max(1, Math.ceil(Math.hypot(to.x - last.x, to.y - last.y) / (r / 3)));
    pen.fillStyle = colour();
    for (let step = 1; step <= steps; step++) {
      dot({ x: last.x + ((to.x - last.x) * step) / steps, y: last.y + ((to.y - last.y) * step) / steps }, r);
    }
    last = to;
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    remember();
    last = place(event);
    stroke(last);
  }, listening);
  canvas.addEventListener("pointermove", (event) => {
    if (last) (event.getCoalescedEvents?.() ?? [event]).forEach((each) => stroke(place(each)));
  }, listening);
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => { if (last) { last = null; keep(); } }, listening);
  }
  const tools = {
    undo: () => { if (past.length) pen.putImageData(past.pop(), 0, 0); },
    fill: () => { remember(); fill(colour()); },
    clear: () => { remember(); fill(box.dataset.ground); },
  };
  for (const button of box.querySelectorAll("[data-do]")) {
    button.addEventListener("click", () => { tools[button.dataset.do](); keep(); }, listening);
  }

  fill(box.dataset.ground);
  const kept = box.dataset.drawn ?? localStorage.getItem(key);
  if (kept?.startsWith("data:image/png;base64,")) {
    const image = new Image();
    image.onload = () => pen.drawImage(image, 0, 0, width, height);
    image.src = kept;
  }
};
start();
watch("value", start);
