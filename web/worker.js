// The model, in a thread of its own: loads the sessions, and answers one question at a time, token by token.
import { Template } from "./lib/jinja.js";
import { Tokenizer } from "./lib/tokenizers.js";
import { pixelValues } from "./picture.js";

const RUNTIMES = { wasm: "ort-wasm-simd-threaded.wasm", webgpu: "ort-wasm-simd-threaded.asyncify.wasm" };

let ort, settings, tokenizer, template, sessions;
let asked = 0; // the number of the question that is being answered; another one stops it

self.onmessage = async ({ data }) => {
  if (data.type === "stop") asked = 0;
  if (data.type === "ask") {
    asked = data.id;
    try {
      await answer(data);
    } catch (error) {
      post("error", data.id, { text: error.message });
    }
  }
};

function post(type, id, fields, transfer = []) {
  self.postMessage({ type, id, ...fields }, transfer);
}

async function load() {
  const json = async (name) => (await fetch(new URL(`model/${name}`, import.meta.url))).json();
  const [read, tokens, tokensConfig] = await Promise.all(["settings.json", "tokenizer.json", "tokenizer_config.json"].map(json));
  settings = read;
  tokenizer = new Tokenizer(tokens, tokensConfig);
  template = new Template(tokensConfig.chat_template);
  const names = ["vision_encoder", "embed_tokens", "decoder_model_merged"];
  const files = await Promise.all(names.map(async (name) => {
    const response = await fetch(new URL(`model/${name}.onnx`, import.meta.url));
    if (!response.ok) throw new Error(`${name}.onnx: ${response.status}`);
    return new Uint8Array(await response.arrayBuffer());
  }));
  const adapter = await self.navigator.gpu?.requestAdapter().catch(() => null);
  const engines = adapter ? ["webgpu", "wasm"] : ["wasm"];
  for (const engine of engines) {
    try {
      await start(engine, files);
      post("ready", 0, { engine, settings });
      return;
    } catch (error) {
      if (engine === "wasm") throw error;
    }
  }
}

async function start(engine, files) {
  ort = await import(`./lib/ort.${engine}.js`);
  ort.env.wasm.wasmPaths = { wasm: new URL(`lib/${RUNTIMES[engine]}`, import.meta.url).href };
  // Several threads need a page that is isolated from others, which its server has to say.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, self.navigator.hardwareConcurrency) : 1;
  sessions = [];
  for (const file of files) {
    sessions.push(await ort.InferenceSession.create(file, { executionProviders: [engine] }));
  }
  // The first run of a session compiles it.
  const side = settings.picture.side;
  await sessions[0].run({ pixel_values: floats(new Float32Array(3 * side * side), [1, 1, 3, side, side]) });
}

const floats = (values, shape) => new ort.Tensor("float32", values, shape);
const integers = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);

async function answer({ id, picture, question, thinking, longest }) {
  const content = [{ type: "image" }, { type: "text", text: question }];
  const options = thinking ? {} : { enable_thinking: false };
  const messages = [{ role: "user", content }];
  const text = template.render({ messages, add_generation_prompt: true, ...options });
  const prompt = ids(text.replace(settings.picture_token, () => settings.picture_text));
  const { max_new_tokens: most, longest: window } = settings;
  if (prompt.length + most > window) {
    throw new Error(`picture and question take ${prompt.length} tokens and the answer up to ${most}, but the model reads ${window}: shorten the question`);
  }
  const [vision, table, decoder] = sessions;
  const side = settings.picture.side;
  const values = pixelValues(picture.data, picture.width, picture.height, settings.picture);
  const { image_features: features } = await vision.run({ pixel_values: floats(values, [1, 1, 3, side, side]) });
  let { inputs_embeds: embeddings } = await table.run({ input_ids: integers(prompt, [1, prompt.length]) });
  const places = prompt.flatMap((token, place) => (token === settings.image_token_id ? [place] : []));
  const width = embeddings.dims[2];
  places.forEach((place, token) => {
    embeddings.data.set(features.data.subarray(token * width, (token + 1) * width), place * width);
  });

  const close = ids("</think><answer>");
  const output = [];
  const ends = []; // how long the text is after each token
  const looks = []; // where each token looked: the attention, to the picture's tokens, of the position that chose it
  let cache = emptyCache(decoder);
  let length = 0; // of what the cache holds
  let forced = [];
  for (let count = 0; count < most; count++) {
    const fresh = embeddings.dims[1];
    const results = await decoder.run({
      inputs_embeds: embeddings,
      attention_mask: integers(new Array(length + fresh).fill(1), [1, length + fresh]),
      position_ids: integers(Array.from({ length: fresh }, (_, place) => length + place), [1, fresh]),
      num_logits_to_keep: new ort.Tensor("int64", BigInt64Array.of(1n), []),
      ...cache,
    });
    length += fresh;
    for (const name of Object.keys(cache)) cache[name] = results[name.replace("past_key_values", "present")];
    const row = results.attention.data.subarray((fresh - 1) * length, fresh * length);
    const token = forced.shift() ?? likeliest(results.logits.data);
    if (settings.end.includes(token)) break;
    output.push(token);
    looks.push(...places.map((place) => row[place]));
    const said = tokenizer.decode(output, { skip_special_tokens: true });
    ends.push(said.length);
    post("token", id, { text: said });
    // Reasoning that has used up its tokens is closed, and the answer follows.
    const begun = said.includes("<think>") && !said.includes("</think>");
    if (begun && forced.length === 0 && output.length - 1 >= longest) forced = [...close];
    await readMessages(); // lets a stop come in
    if (asked !== id) return;
    ({ inputs_embeds: embeddings } = await table.run({ input_ids: integers([token], [1, 1]) }));
  }
  const weights = Float32Array.from(looks);
  post("done", id, { ends, weights }, [weights.buffer]);
}

// Waits until messages that have come in are read; a timer would wait for milliseconds.
function readMessages() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resume) => {
    port1.onmessage = () => {
      port1.close();
      resume();
    };
    port2.postMessage(null);
  });
}

function ids(text) {
  return Array.from(tokenizer.encode(text, { add_special_tokens: false }).ids, Number);
}

function emptyCache(decoder) {
  const cache = {};
  for (const { name, shape } of decoder.inputMetadata) {
    if (name.startsWith("past_key_values.")) cache[name] = floats(new Float32Array(0), [1, shape[1], 0, shape[3]]);
  }
  return cache;
}

function likeliest(logits) {
  let best = -1;
  for (let token = 0; token < logits.length; token++) {
    if (!settings.suppressed.includes(token) && (best < 0 || logits[token] > logits[best])) best = token;
  }
  return best;
}

load().catch((error) => post("failed", 0, { text: error.message }));
