// The model in the browser: the same file as on the server, run by ONNX Runtime's build for browsers.

import * as ort from "./runtime/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("runtime/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need a header that keeps other pages' windows out
ort.env.wasm.proxy = false;

const MAX_PIXELS = 1_000_000; // a photo is made smaller first: phones have little memory
const NUM_GUESSES = 5;

/** Opens a model file. */
export function open(bytes) {
  return ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
}

/** The pixels of a photo file, upright: {data: RGB, height, width}. The browser decodes it, not FedShelf. */
export async function pixelsOf(file) {
  const photo = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  const scale = Math.min(1, Math.sqrt(MAX_PIXELS / (photo.width * photo.height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(photo.width * scale));
  canvas.height = Math.max(1, Math.round(photo.height * scale));
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  context.fillStyle = "white"; // under transparent pixels, as in training
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  photo.close();
  const rgba = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const data = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    data[to++] = rgba[from];
    data[to++] = rgba[from + 1];
    data[to++] = rgba[from + 2];
  }
  return { data, height: canvas.height, width: canvas.width };
}

/** The probability of each product. */
export async function probabilitiesOf(session, { data, height, width }) {
  const answer = await session.run({ image: new ort.Tensor("uint8", data, [1, height, width, 3]) });
  return answer.probabilities.data;
}

/** What /v1/predict would answer for these probabilities; `model` is the answer of /v1/model. */
export function predictionOf(probabilities, model) {
  const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
  const predictions = order
    .slice(0, NUM_GUESSES)
    .map((at) => ({ product: model.products[at], probability: probabilities[at] }));
  const sure = predictions[0].probability >= model.threshold;
  return { predictions, sure, model: model.model, folder: sure ? null : sureFolder(probabilities, model) };
}

function sureFolder(probabilities, { paths, threshold }) {
  const parts = paths.map((path) => path.split("/"));
  const products = new Set(paths);
  let found = null;
  for (let level = 1; level < Math.max(...parts.map((names) => names.length)); level++) {
    const sums = new Map();
    parts.forEach((names, at) => {
      const folder = names.slice(0, level).join("/");
      sums.set(folder, (sums.get(folder) ?? 0) + probabilities[at]);
    });
    const [path, sum] = [...sums].reduce((best, next) => (next[1] > best[1] ? next : best));
    if (sum >= threshold && !products.has(path)) found = { path, probability: Math.min(1, sum) };
  }
  return found;
}
