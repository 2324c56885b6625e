// Draws one prompt with a method and then with another one, and shows both on their way.
"use strict";

const PREVIEWS = 64; // of an image, at most
const ONE_TOKEN = "ar";
const SHOWN_FIRST = "exact"; // gives the very image of ONE_TOKEN, so that the first two images are equal
const SHADES = [ // of the map: tokens committed by one pass, and a colour
  [1, "#4d3f8f"], [2, "#3a5a8c"], [3, "#2a7f8e"], [5, "#35a373"], [8, "#93c94b"], [13, "#f3dc3d"],
];

const $ = (id) => document.getElementById(id);
const form = $("form");
let methods = {}; // by name
let running = null; // what stops the images under way

class Refused extends Error {}

// ------------------------------------------------------------------------------------------------------ the server

async function connect() {
  const reply = await fetch("v1/models");
  if (!reply.ok) throw new Refused(await messageOf(reply));
  const model = (await reply.json()).data[0];
  methods = Object.fromEntries(model.methods.map((method) => [method.name, method]));
  $("model").textContent = `${model.id} · ${model.sizes[0]} pixels`;
  $("window").max = model.max_window_size;
  $("window").value = model.default_window_size;
  $("window-hint").textContent = `1 to ${model.max_window_size} tokens a pass`;
  const names = model.methods.map((method) => method.name);
  fill($("method"), names.map((name) => [name, name]));
  fill($("beside"), [["", "nothing"], ...names.map((name) => [name, name === ONE_TOKEN ? "ar: one token a pass" : name])]);
  $("method").value = SHOWN_FIRST in methods ? SHOWN_FIRST : model.default_method;
  $("beside").value = ONE_TOKEN;
  describeMethod();
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

function describeMethod() {
  const { summary, lossless } = methods[$("method").value];
  const text = summary.replaceAll("`", "");
  $("method-hint").textContent = `${text[0].toUpperCase()}${text.slice(1)}.${lossless ? " Lossless." : ""}`;
}

async function messageOf(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `${reply.status} ${reply.statusText}`;
  }
}

// The events of one streamed request, as the objects that they carry.
async function* eventsOf(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const reply = await fetch("v1/images/generations", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!reply.ok) throw new Refused(await messageOf(reply));
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}

// --------------------------------------------------------------------------------------------------------- one image

class Run {
  constructor(method, window_size) {
    const part = $("run").content.cloneNode(true);
    this.method = method;
    this.element = part.querySelector(".run");
    const note = document.createElement("small");
    note.textContent = method === ONE_TOKEN ? "one token a pass" : window_size ? `window ${window_size}` : "";
    const title = this.element.querySelector("h2");
    title.append(method, note);
    if (!methods[method].lossless) {
      const lossy = document.createElement("small");
      lossy.className = "lossy";
      lossy.textContent = method === "jacobi" ? "greedy" : "lossy";
      title.append(lossy);
    }
    for (const name of ["image", "map", "progress", "passes", "seconds", "ratio"]) {
      this[name] = this.element.querySelector(`.${name}`);
    }
    this.progress.setAttribute("aria-label", `Tokens of ${method}`);
    this.rates = []; // of each cell: tokens of the pass that committed it
    this.passesSeen = 0;
    $("runs").append(this.element);
    this.describe("waiting");
  }

  describe(state) {
    this.image.setAttribute("aria-label", `${$("prompt").value}, drawn with ${this.method}: ${state}`);
    this.map.setAttribute("aria-label", `Acceleration map of ${this.method}: ${state}`);
  }

  async draw(body, signal) {
    const started = performance.now();
    for await (const event of eventsOf(body, signal)) {
      if (event.error) throw new Refused(event.error.message);
      const picture = await decoded(event.b64_json);
      if (event.type === "image_generation.completed") {
        this.complete(event.stats, picture);
        return;
      }
      this.preview(event, picture, (performance.now() - started) / 1000);
    }
    throw new Refused("the server ended the stream before the image was complete");
  }

  preview(event, picture, seconds) {
    const share = event.num_committed / event.num_tokens;
    paint(this.image, picture, event.grid, event.committed_cells, event.drafted_cells);
    const rate = (event.committed_cells - this.rates.length) / (event.nfe - this.passesSeen); // some passes are not seen
    while (this.rates.length < event.committed_cells) this.rates.push(rate);
    this.passesSeen = event.nfe;
    paintMap(this.map, this.rates, event.grid);
    this.show(event.nfe, seconds, event.num_committed / event.nfe, share);
    this.describe(`${Math.round(100 * share)} percent`);
  }

  complete(stats, picture) {
    const grid = [stats.acceptance_map.length, stats.acceptance_map[0].length];
    paint(this.image, picture, grid, grid[0] * grid[1], grid[0] * grid[1]);
    paintMap(this.map, tokensTogether(stats.acceptance_map.flat()), grid);
    this.stats = stats;
    this.pixels = pixelsOf(picture);
    this.show(stats.nfe, stats.seconds, stats.step_compression, 1);
    this.describe(`complete after ${stats.nfe} passes, ${stats.step_compression.toFixed(2)} tokens a pass`);
    this.element.dataset.complete = "";
  }

  show(passes, seconds, ratio, share) {
    this.passes.textContent = passes;
    this.seconds.textContent = seconds.toFixed(2);
    this.ratio.textContent = ratio.toFixed(2);
    this.progress.firstElementChild.style.width = `${100 * share}%`;
    this.progress.setAttribute("aria-valuenow", Math.round(100 * share));
  }
}

async function decoded(b64) {
  const picture = new Image();
  picture.src = `data:image/png;base64,${b64}`;
  await picture.decode();
  return picture;
}

function pixelsOf(picture) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}

// --------------------------------------------------------------------------------------------------------- canvases

// The outline of cells first..last - 1, row by row.
function cells(first, last, [rows, cols], width, height) {
  const path = new Path2D();
  for (let row = Math.floor(first / cols); row * cols < last; row++) {
    const from = Math.max(first - row * cols, 0);
    const to = Math.min(last - row * cols, cols);
    path.rect((from * width) / cols, (row * height) / rows, ((to - from) * width) / cols, height / rows);
  }
  return path;
}

function fit(canvas, ratio) {
  canvas.height = Math.round(canvas.width / ratio);
  canvas.style.aspectRatio = ratio;
  return canvas.getContext("2d");
}

function paint(canvas, picture, grid, committed, drafted) {
  const context = fit(canvas, picture.naturalWidth / picture.naturalHeight);
  const { width, height } = canvas;
  context.imageSmoothingEnabled = picture.naturalWidth >= width;
  const layer = (first, last, alpha, filter) => {
    if (first >= last) return;
    context.save();
    context.clip(cells(first, last, grid, width, height));
    context.globalAlpha = alpha;
    context.filter = filter;
    context.drawImage(picture, 0, 0, width, height);
    context.restore();
  };
  markCells(context, drafted, grid, width, height);
  layer(committed, drafted, 0.55, "blur(5px) saturate(0.7)");
  layer(0, committed, 1, "none");
}

// A dot for each cell from `first` on: tokens to come.
function markCells(context, first, [rows, cols], width, height) {
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--line");
  for (let cell = first; cell < rows * cols; cell++) {
    const [row, col] = [Math.floor(cell / cols), cell % cols];
    context.beginPath();
    context.arc(((col + 0.5) * width) / cols, ((row + 0.5) * height) / rows, width / cols / 9, 0, 2 * Math.PI);
    context.fill();
  }
}

// For the pass that committed each cell, how many cells it committed.
function tokensTogether(passes) {
  const together = new Map();
  for (const pass of passes) together.set(pass, (together.get(pass) ?? 0) + 1);
  return passes.map((pass) => together.get(pass));
}

function paintMap(canvas, rates, grid) {
  const [rows, cols] = grid;
  const context = fit(canvas, cols / rows);
  const [width, height] = [canvas.width / cols, canvas.height / rows];
  const gap = Math.min(2, width / 8);
  rates.forEach((rate, cell) => {
    context.fillStyle = (SHADES.findLast(([least]) => rate >= least) ?? SHADES[0])[1];
    context.fillRect((cell % cols) * width, Math.floor(cell / cols) * height, width - gap, height - gap);
  });
}

function makeLegend() {
  $("legend").querySelector("ol").replaceChildren(...SHADES.map(([least, colour], i) => {
    const item = document.createElement("li");
    const swatch = document.createElement("i");
    swatch.style.background = colour;
    const next = SHADES[i + 1]?.[0];
    item.append(swatch, next === undefined ? `${least} or more` : next - 1 > least ? `${least}–${next - 1}` : `${least}`);
    return item;
  }));
}

// -------------------------------------------------------------------------------------------------------- the form

function tell(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function draw() {
  const windowOf = (name) => (methods[name].takes_window ? $("window").valueAsNumber : null);
  const body = { prompt: $("prompt").value, seed: $("seed").valueAsNumber, stream: true, partial_images: PREVIEWS };
  running = new AbortController();
  $("draw").disabled = true;
  $("stop").disabled = false;
  $("runs").replaceChildren();
  $("legend").hidden = false;
  const names = [$("method").value, $("beside").value].filter(Boolean);
  const runs = names.map((name) => new Run(name, windowOf(name)));
  try {
    for (const run of runs) {
      tell(`Drawing “${body.prompt}” with ${run.method} …`);
      await run.draw({ ...body, method: run.method, window_size: windowOf(run.method) }, running.signal);
    }
    tell(verdict(runs));
  } catch (error) {
    if (error.name === "AbortError") tell("Stopped.");
    else tell(error instanceof Refused ? error.message : "The server does not answer.", true);
  } finally {
    running = null;
    $("draw").disabled = false;
    $("stop").disabled = true;
  }
}

function verdict([first, second]) {
  const { nfe, num_tokens, seconds } = first.stats;
  if (!second) return `Done: ${num_tokens} tokens in ${nfe} passes and ${seconds.toFixed(2)} seconds.`;
  const equal = first.pixels.length === second.pixels.length && first.pixels.every((value, i) => value === second.pixels[i]);
  const passes = `${first.method} took ${nfe} passes, ${second.method} ${second.stats.nfe}.`;
  if (equal) return `The same image, pixel for pixel. ${passes}`;
  const lawful = methods[first.method].lossless && methods[second.method].lossless;
  return `${lawful ? "Two images of one law" : "Two images"}. ${passes}`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) draw();
});
$("stop").addEventListener("click", () => running?.abort());
$("method").addEventListener("change", describeMethod);
$("dice").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
for (const chip of document.querySelectorAll(".chips button")) {
  chip.addEventListener("click", () => { $("prompt").value = chip.textContent; });
}
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    form.requestSubmit();
  }
});
makeLegend();
connect().catch((error) => tell(error instanceof Refused ? error.message : "The server does not answer.", true));
