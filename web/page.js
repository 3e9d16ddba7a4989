// The page: a picture, a question, and a card on which the answer grows.
import { takeApart } from "./parts.js";

const MOST_PIXELS = 40_000_000;
const COLD = [15, 23, 42, 185]; // red, green, blue, opacity: where the model did not look
const HOT = [255, 130, 10, 110];

const find = (selector) => document.querySelector(selector);
const card = find("#card");
const worker = new Worker("worker.js", { type: "module" });
let settings = null;
let ready = false;
let current = null; // the picture in the box: {data, width, height, url}
let question = 0; // the number of the last question
let shown = null; // what the card is about: {id, picture, text, weights, ends}

worker.onmessage = ({ data }) => {
  if (data.type === "ready") {
    settings = data.settings;
    ready = true;
    find("#ask").disabled = false;
    document.body.dataset.engine = data.engine;
    find("#longest").max = settings.max_new_tokens;
    find("#longest").value = settings.max_new_tokens;
    showLongest();
    setState("idle");
  } else if (data.type === "failed") {
    say(`The model could not be loaded (${data.text}). Reload the page to try again.`);
    setState("stopped");
  } else if (data.id === shown?.id && card.dataset.state !== "stopped") {
    if (data.type === "token") grow(data.text);
    if (data.type === "done") finish(data);
    if (data.type === "error") {
      say(data.text);
      setState("stopped");
    }
  }
};
worker.onerror = () => say("This browser cannot run the model: it needs module workers and WebAssembly.");

const STATES = { loading: "loading …", idle: "ready", thinking: "thinking …", answering: "answering …", done: "done", stopped: "stopped" };
function setState(state) {
  card.dataset.state = state;
  find(".siq-state").textContent = STATES[state];
}

function say(text) {
  find("#message").textContent = text;
}

// The picture box.
async function open(file, name) {
  say("");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    empty();
    say(`${name} is not a picture that can be read: take a PNG, JPEG or WebP.`);
    return false;
  }
  if (bitmap.width * bitmap.height > MOST_PIXELS) {
    empty();
    say(`${name} has too many pixels (${bitmap.width} × ${bitmap.height}): make it smaller first.`);
    return false;
  }
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const { data, width, height } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  current = { data, width, height, url: URL.createObjectURL(await canvas.convertToBlob()) };
  find("#picture").src = current.url;
  find("#drop").classList.add("filled");
  return true;
}

function empty() {
  current = null;
  find("#picture").removeAttribute("src");
  find("#drop").classList.remove("filled");
}

find("#file").onchange = ({ target }) => {
  if (target.files.length) open(target.files[0], target.files[0].name);
  target.value = "";
};
for (const name of ["dragover", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    const file = event.dataTransfer?.files[0];
    if (name === "drop" && file) open(file, file.name);
  });
}
document.addEventListener("paste", ({ clipboardData }) => {
  const file = clipboardData.files[0];
  if (file) open(file, file.name || "the pasted file");
});

// Asking.
find("#longest").oninput = showLongest;
function showLongest() {
  find("#longest-shown").value = find("#longest").value;
}
find("#question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    find("#form").requestSubmit();
  }
};
find("#form").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
find("#stop").onclick = () => {
  worker.postMessage({ type: "stop" });
  if (["thinking", "answering"].includes(card.dataset.state)) setState("stopped");
};

function ask() {
  const text = find("#question").value.trim();
  say("");
  if (!ready) return;
  if (current === null) return say("There is no picture yet: drop one into the box, or take an example.");
  if (text === "") return say("The question is empty: ask something about the picture.");
  shown = { id: ++question, picture: current, text: "", weights: null, ends: [] };
  find(".siq-hint").hidden = true;
  find("#output").hidden = false;
  find(".siq-question").textContent = text;
  find(".siq-seen img").src = current.url;
  find(".siq-body").style.setProperty("--ratio", (current.width / current.height).toFixed(4));
  find(".siq-seen img").classList.toggle("pixels", Math.max(current.width, current.height) < 256);
  look(null);
  grow("");
  const { data, width, height } = current;
  const thinking = find("#thinking").checked;
  const longest = Number(find("#longest").value);
  worker.postMessage({ type: "ask", id: shown.id, picture: { data, width, height }, question: text, thinking, longest });
}

// The card.
function grow(text) {
  shown.text = text;
  card.dataset.output = text;
  const { steps, answer } = takeApart(text);
  setState(answer ? "answering" : "thinking");
  write(steps, answer);
}

function finish({ ends, weights }) {
  Object.assign(shown, { ends, weights });
  const { steps, answer } = takeApart(shown.text);
  setState("done");
  write(steps, answer);
  if (answer) find(".siq-answer input").click();
}

function write(steps, answer) {
  const state = card.dataset.state;
  const line = find(".siq-answer p");
  line.replaceChildren();
  if (answer) line.append(words(answer));
  else if (state === "done") line.append(Object.assign(document.createElement("span"), { className: "siq-missing", textContent: "No answer within the bound on tokens." }));
  else line.append(Object.assign(document.createElement("span"), { className: "siq-wait" }));
  find(".siq-reasoning").hidden = steps.length === 0;
  const items = steps.map((step) => {
    const item = document.createElement("li");
    for (const part of step) item.append(words(part), " ");
    return item;
  });
  find(".siq-reasoning ol").replaceChildren(...items);
  find(".siq-note").hidden = shown.weights === null;
}

// Words which, pointed at or chosen, show where the model looked while it wrote them.
function words(part) {
  const text = Object.assign(document.createElement("span"), { textContent: part.text });
  if (shown.weights === null) return text;
  const label = Object.assign(document.createElement("label"), { className: "siq-look" });
  const choice = Object.assign(document.createElement("input"), { type: "radio", name: "look" });
  choice.onchange = () => look(part);
  label.onmouseenter = () => look(part);
  label.onmouseleave = () => find(".siq-look input:checked")?.onchange();
  label.append(choice, text);
  return label;
}

// Lays the attention of the tokens that wrote a part over the picture; takes it away for null.
function look(part) {
  const veil = find(".siq-seen canvas");
  const caption = find(".siq-seen figcaption");
  veil.hidden = part === null;
  caption.textContent = "";
  if (part === null) return;
  const { rows, columns } = settings.picture;
  const heat = new Float64Array(rows * columns);
  let tokens = 0;
  shown.ends.forEach((end, token) => {
    const start = token === 0 ? 0 : shown.ends[token - 1];
    if (start >= part.end || end <= part.start) return;
    tokens += 1;
    for (let cell = 0; cell < heat.length; cell++) heat[cell] += shown.weights[token * heat.length + cell];
  });
  const hottest = Math.max(...heat, 1e-12);
  veil.width = columns;
  veil.height = rows;
  const context = veil.getContext("2d");
  const image = context.createImageData(columns, rows);
  heat.forEach((value, cell) => {
    for (let channel = 0; channel < 4; channel++) {
      image.data[cell * 4 + channel] = Math.round(COLD[channel] + (value / hottest) * (HOT[channel] - COLD[channel]));
    }
  });
  context.putImageData(image, 0, 0);
  const share = heat.reduce((sum, value) => sum + value, 0) / Math.max(tokens, 1);
  caption.textContent = `${Math.round(100 * share)}% of the attention was on the picture`;
}

// The examples.
async function take(example, button) {
  const blob = await (await fetch(button.querySelector("img").src)).blob();
  if (await open(blob, example.image)) find("#question").value = example.question;
}
const examples = await (await fetch("examples/examples.json")).json();
for (const example of examples) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "example" });
  const image = Object.assign(document.createElement("img"), { alt: "" });
  // Kept in memory, so that examples can be taken without a network.
  image.src = URL.createObjectURL(await (await fetch(`examples/${example.image}`)).blob());
  button.append(image, Object.assign(document.createElement("span"), { textContent: example.question }));
  button.onclick = () => take(example, button);
  find("#examples").append(button);
}
await take(examples[0], find("#examples button"));
