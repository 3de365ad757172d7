// Loads the model and generates text, away from the page's own thread.
// In: {type: "generate", prompt, temperature, topK, length} and {type: "stop"}.
// Out: "progress", "ready", "token", "done" and "error", with the fields given where they are posted.

import {
  AutoModelForCausalLM,
  AutoTokenizer,
  BaseStreamer,
  InterruptableStoppingCriteria,
  LogitsProcessor,
  TemperatureLogitsWarper,
  env,
} from "./vendor/transformers.min.js";

const folder = new URL("./", import.meta.url).href;
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./";
env.fetch = fetchFile;
// The browser's own cache asks whether a file has changed; these would keep the first version for good.
env.useBrowserCache = false;
env.useWasmCache = false;
// The runtime for CPUs is half as large as the default one, which can also use WebGPU.
env.backends.onnx.wasm.wasmPaths = {
  mjs: `${folder}vendor/ort-wasm-simd-threaded.mjs`,
  wasm: `${folder}vendor/ort-wasm-simd-threaded.wasm`,
};

const interruption = new InterruptableStoppingCriteria();
const channel = new MessageChannel();
let tokenizer;
let model;

/** Fetch a file of the page, and post how much of the weights has arrived. */
async function fetchFile(path, options) {
  const response = await fetch(new URL(path, folder), options);
  if (!response.ok || !path.endsWith(".onnx")) return response;
  const total = Number(response.headers.get("Content-Length"));
  let loaded = 0;
  const counter = new TransformStream({
    transform(chunk, controller) {
      loaded += chunk.length;
      postMessage({ type: "progress", loaded, total });
      controller.enqueue(chunk);
    },
  });
  return new Response(response.body.pipeThrough(counter), response);
}

/** Let messages to this worker arrive: the runtime computes without a pause in which "stop" could be read. */
function readMessages() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}

async function load() {
  tokenizer = await AutoTokenizer.from_pretrained("model");
  model = await AutoModelForCausalLM.from_pretrained("model", { dtype: "q8" });
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => {
    await readMessages();
    return forward(inputs);
  };
  postMessage({ type: "ready" });
}

/** Keeps the logits of the last position as the model gave them: processors that follow may change them. */
class ModelLogits extends LogitsProcessor {
  _call(inputIds, logits) {
    this.logits = logits.data.slice();
    return logits;
  }

  /** -log2 p of a token. */
  bits(id) {
    const highest = this.logits.reduce((a, b) => Math.max(a, b));
    const sum = this.logits.reduce((total, logit) => total + Math.exp(logit - highest), 0);
    return (Math.log(sum) + highest - this.logits[id]) / Math.LN2;
  }
}

/** Posts generated text with its surprise. A character of several tokens is posted whole, with the sum of theirs. */
class TokenStreamer extends BaseStreamer {
  constructor(modelLogits) {
    super();
    this.modelLogits = modelLogits;
    this.prompt = true;
    this.count = 0;
    this.pending = [];
    this.bits = 0;
  }

  put([ids]) {
    if (this.prompt) {
      this.prompt = false;
      return;
    }
    const id = Number(ids[0]);
    this.count += 1;
    this.ended = id === tokenizer.eos_token_id;
    if (this.ended) return;
    this.pending.push(id);
    this.bits += this.modelLogits.bits(id);
    if (!this.text().endsWith("\ufffd")) this.post();
  }

  end() {
    if (this.pending.length > 0) this.post();
  }

  text() {
    return tokenizer.decode(this.pending, { clean_up_tokenization_spaces: false });
  }

  post() {
    postMessage({ type: "token", text: this.text(), bits: this.bits });
    this.pending = [];
    this.bits = 0;
  }
}

async function generate({ prompt, temperature, topK, length }) {
  const inputs = tokenizer(prompt);
  const context = model.config.max_position_embeddings;
  const promptTokens = inputs.input_ids.dims[1];
  if (promptTokens >= context) {
    throw new Error(`The prompt has ${promptTokens} tokens and the model reads at most ${context}. Shorten it.`);
  }
  const modelLogits = new ModelLogits();
  const streamer = new TokenStreamer(modelLogits);
  const sample = temperature > 0;
  interruption.reset();
  const start = performance.now();
  await model.generate({
    ...inputs,
    do_sample: sample,
    temperature: 1, // applied by the processor below, after the model's logits are kept
    top_k: topK,
    max_new_tokens: Math.min(length, context - promptTokens),
    logits_processor: sample ? [modelLogits, new TemperatureLogitsWarper(temperature)] : [modelLogits],
    stopping_criteria: interruption,
    streamer,
  });
  const seconds = (performance.now() - start) / 1000;
  postMessage({
    type: "done",
    tokens: streamer.count,
    seconds,
    end: streamer.ended ? "end" : interruption.interrupted ? "stop" : "length",
  });
}

function inWords(error) {
  const message = String(error?.message ?? error);
  if (/memory|bad_alloc|allocat/i.test(message)) {
    return `There is not enough memory for the model. Close other tabs or programs and load the page again. (${message})`;
  }
  const missing = message.match(/not found locally at "(?:\.\/)?(.*)"/);
  if (missing) return `The model is incomplete: the file ${missing[1]} is missing.`;
  if (error instanceof TypeError && /fetch|network/i.test(message)) {
    return "The connection was lost while the model was loading. Load the page again.";
  }
  return model ? message : `The model can't be loaded: ${message}`;
}

function report(error) {
  console.error(error);
  postMessage({ type: "error", message: inWords(error) });
}

addEventListener("message", ({ data }) => {
  if (data.type === "stop") interruption.interrupt();
  else generate(data).catch(report);
});

load().catch(report);
