// The page: sends the form to the worker and shows what the worker sends.

const MOST_BITS = 12; // surprise with the full color of the legend
const ENDS = { end: "The model ended the text.", stop: "Stopped.", length: "Done." };

const byId = (id) => document.getElementById(id);
const form = byId("form");
const prompt = byId("prompt");
const generate = byId("generate");
const stop = byId("stop");
const progress = byId("progress");
const status = byId("status");
const error = byId("error");
const output = byId("output");
const token = byId("token");

let worker;
let ready = false;
let selected;

const handlers = {
  progress({ loaded, total }) {
    if (loaded < total) {
      progress.value = loaded / total;
      status.textContent = `Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB`;
    } else {
      progress.removeAttribute("value");
      status.textContent = "Starting the model…";
    }
  },
  ready() {
    ready = true;
    progress.hidden = true;
    finish("The model is ready.");
  },
  token({ text, bits }) {
    const span = document.createElement("span");
    span.textContent = text;
    span.title = `${bits.toFixed(2)} bits`;
    span.style.setProperty("--share", `${Math.min(bits / MOST_BITS, 1) * 100}%`);
    output.append(span);
  },
  done({ tokens, seconds, end }) {
    const speed = (tokens / seconds).toFixed(0);
    finish(`${ENDS[end]} ${tokens} tokens in ${seconds.toFixed(1)} s, ${speed} tokens/s.`);
  },
  error({ message }) {
    fail(message);
  },
};

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(1);
}

function startWorker() {
  if (typeof WebAssembly === "undefined") {
    fail("This browser has no WebAssembly, which the model needs. It may be switched off, or the browser too old.");
    return;
  }
  progress.hidden = false;
  status.textContent = "Loading the model…";
  // Only a worker made from a blob follows the Content-Security-Policy of the page. One made from a file follows the
  // HTTP headers of that file, which a static page can't set.
  const source = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  worker = new Worker(url, { type: "module" });
  worker.addEventListener("message", ({ data: { type, ...fields } }) => handlers[type](fields));
  worker.addEventListener("error", () =>
    fail("The page can't start: one of its files is missing, perhaps in vendor/, or the browser is too old."),
  );
}

function finish(message) {
  status.textContent = message;
  output.removeAttribute("aria-busy");
  generate.disabled = !ready;
  stop.disabled = true;
}

function fail(message) {
  progress.hidden = true;
  finish("");
  error.textContent = message;
  error.hidden = false;
}

function select(span) {
  selected?.classList.remove("selected");
  selected = span;
  selected.classList.add("selected");
  token.textContent = `“${selected.textContent}”: ${selected.title}`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  error.hidden = true;
  selected = undefined;
  output.replaceChildren(prompt.value);
  output.setAttribute("aria-busy", "true");
  status.textContent = "Generating…";
  generate.disabled = true;
  stop.disabled = false;
  worker.postMessage({
    type: "generate",
    prompt: prompt.value,
    temperature: byId("temperature").valueAsNumber,
    topK: byId("top-k").valueAsNumber,
    length: byId("length").valueAsNumber,
  });
});

stop.addEventListener("click", () => worker.postMessage({ type: "stop" }));

byId("examples").addEventListener("click", ({ target }) => {
  if (target.matches("button")) prompt.value = target.textContent;
});

output.addEventListener("pointerover", ({ target }) => {
  if (target.matches("span")) select(target);
});

output.addEventListener("keydown", (event) => {
  const next = {
    ArrowRight: selected ? selected.nextElementSibling : output.firstElementChild,
    ArrowLeft: selected?.previousElementSibling,
  }[event.key];
  if (next) {
    event.preventDefault();
    select(next);
  }
});

startWorker();
