"use strict";

// Names of products come from the model and are only ever inserted as text (textContent, value), never as markup.

const TEXTS = {
  en: {
    language: "中文",
    otherLanguage: "zh",
    title: "What is this product?",
    photoHeading: "Photo",
    take: "Take a photo",
    choose: "Choose a photo",
    camera: "Live camera",
    shutter: "Name this product",
    stop: "Stop the camera",
    preview: "The photo",
    guesses: "Most likely products",
    looking: "Looking…",
    notSure: "Not sure",
    some: "It is probably something from {folder} ({percent}).",
    wrong: "Wrong? Tell us",
    which: "Which product is it?",
    send: "Send",
    sending: "Sending…",
    training: "Thank you. The store's next training round learns from this photo.",
    learned: "Thank you. The answers have learned from this photo already.",
    inbox: "Thank you. This product is new: the photo waits until it is added.",
    review: "Thank you. A colleague looks at this photo first.",
    private: "Photos stay in this store.",
    noCamera: "The camera cannot be used: allow it in the browser, or take a photo instead.",
    noToken: "This device is not allowed yet: open the link that the server showed when it was first started.",
    busy: "Too many photos at the same time. Try again in a moment.",
    notAPhoto: "This file cannot be read as a photo.",
    tooLarge: "This photo is too large.",
    unreachable: "The server does not answer. Is it running?",
    onDevice: "Named on this device.",
    noModel: "This browser cannot run the model: {reason}",
    failed: "That did not work: {reason}",
  },
  zh: {
    language: "English",
    otherLanguage: "en",
    title: "这是什么商品？",
    photoHeading: "照片",
    take: "拍照",
    choose: "选择照片",
    camera: "实时相机",
    shutter: "识别这个商品",
    stop: "关闭相机",
    preview: "照片",
    guesses: "最可能的商品",
    looking: "正在识别…",
    notSure: "不确定",
    some: "很可能属于 {folder}（{percent}）。",
    wrong: "不对？告诉我们",
    which: "这是哪个商品？",
    send: "发送",
    sending: "正在发送…",
    training: "谢谢。门店的下一轮训练会用到这张照片。",
    learned: "谢谢。识别结果已经学习了这张照片。",
    inbox: "谢谢。这是新商品：加入商品目录之前，照片先保存在待处理区。",
    review: "谢谢。同事会先查看这张照片。",
    private: "照片不会离开本店。",
    noCamera: "无法使用相机：请在浏览器中允许使用，或改为拍照上传。",
    noToken: "此设备尚未获得许可：请打开服务器首次启动时显示的链接。",
    busy: "同时处理的照片太多，请稍后再试。",
    notAPhoto: "无法把此文件读作照片。",
    tooLarge: "这张照片太大。",
    unreachable: "服务器没有响应。它在运行吗？",
    onDevice: "已在本设备上识别。",
    noModel: "此浏览器无法运行模型：{reason}",
    failed: "操作失败：{reason}",
  },
};
const BY_STATUS = { 401: "noToken", 413: "tooLarge", 422: "notAPhoto", 503: "busy" };
const MAX_SUGGESTIONS = 50;
const RETRIES = 3;
const CACHE = "fedshelf-1"; // as in service-worker.js

const element = (id) => document.getElementById(id);
let language = "en";
let model = null; // the answer of /v1/model
let photo = null; // the photo that is shown
let prediction = null; // the answer for it
let shownStatus = null; // [key, values] of the status line
let stream = null; // of the camera
let onDevice = null; // with --in-browser, a promise of what names photos on this device
let latest = 0; // number of the newest request, so that a late answer does not replace a newer one

function text(key, values = {}) {
  return TEXTS[language][key].replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

function percent(probability) {
  return new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: 1 }).format(probability);
}

function stored(key, value) {
  try {
    if (value !== undefined) localStorage.setItem(key, value);
    return localStorage.getItem(key);
  } catch {
    return value ?? null; // storage is switched off
  }
}

function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    stored("token", given);
    history.replaceState(null, "", location.pathname); // not in the address bar, the history or a bookmark
  }
  return given || stored("token");
}

const token = takeToken();

class Refusal extends Error {
  constructor(status, reason) {
    super(reason);
    this.status = status;
  }
}

const request = async (path, form) => (await send(path, form)).json();

async function send(path, form) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  for (let attempt = 0; ; attempt++) {
    const answer = await fetch(path, { method: form ? "POST" : "GET", body: form, headers });
    if (answer.ok) return answer;
    if (answer.status === 503 && attempt < RETRIES) {
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
      continue;
    }
    const reason = await answer.json().then((content) => content.error, () => answer.statusText);
    throw new Refusal(answer.status, reason);
  }
}

function showStatus(key, values = {}, { isError = false } = {}) {
  shownStatus = key ? [key, values, { isError }] : null;
  element("status").textContent = key ? text(key, values) : "";
  element("status").classList.toggle("error", isError);
}

function showError(error) {
  if (!(error instanceof Refusal)) showStatus("unreachable", {}, { isError: true });
  else if (error.status in BY_STATUS) showStatus(BY_STATUS[error.status], {}, { isError: true });
  else showStatus("failed", { reason: error.message }, { isError: true });
}

function showLanguage() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = text("title");
  for (const found of document.querySelectorAll("[data-text]")) found.textContent = text(found.dataset.text);
  for (const found of document.querySelectorAll("[data-label]")) found.setAttribute("aria-label", text(found.dataset.label));
  element("preview").alt = text("preview");
  element("language-button").textContent = text("language");
  element("language-button").lang = text("otherLanguage");
  if (shownStatus) showStatus(...shownStatus);
  if (prediction) showPrediction();
}

function showPrediction() {
  const [best] = prediction.predictions;
  element("verdict").textContent = prediction.sure ? best.product : text("notSure");
  const folder = prediction.folder;
  element("folder").hidden = !folder;
  element("folder").textContent = folder
    ? text("some", { folder: folder.path.replaceAll("/", " › "), percent: percent(folder.probability) })
    : "";
  element("guesses").replaceChildren(...prediction.predictions.map(guessItem));
  element("wrong-button").hidden = !model?.corrections;
  element("result").hidden = false;
  element("result").scrollIntoView({ block: "nearest" });
}

function guessItem({ product, probability }) {
  const item = document.createElement("li");
  const name = document.createElement("span");
  const number = document.createElement("span");
  const bar = document.createElement("meter");
  name.className = "product";
  name.textContent = product;
  number.className = "probability";
  number.textContent = percent(probability);
  bar.value = probability;
  bar.setAttribute("aria-hidden", "true"); // the number says the same
  item.append(name, number, bar);
  return item;
}

function hideCorrection() {
  element("correction-form").hidden = true;
  element("correction-form").reset();
  element("wrong-button").setAttribute("aria-expanded", "false");
}

// Keeps an answer for when the network is cut. Browsers do so on HTTPS and localhost.
async function keep(path, answer) {
  try {
    const cache = await caches.open(CACHE);
    await cache.put(path, answer);
  } catch {
    // no cache here, or no room in it: the model is fetched anew next time
  }
}

async function openOnDevice() {
  const [runtime, answer] = await Promise.all([import("./in-browser.js"), send(modelFile())]);
  await keep(modelFile(), answer.clone());
  const session = await runtime.open(await answer.arrayBuffer());
  return async (file) => {
    const pixels = await runtime.pixelsOf(file).catch(() => {
      throw new Refusal(422, "");
    });
    return runtime.predictionOf(await runtime.probabilitiesOf(session, pixels), model);
  };
}

const modelFile = () => `v1/model.onnx?${model.model}`;

// Registers the service worker and keeps the model; without --in-browser, removes what an earlier start has kept.
async function prepareDevice() {
  if (!model.in_browser) {
    for (const found of (await navigator.serviceWorker?.getRegistrations()) ?? []) await found.unregister();
    if ("caches" in window) await caches.delete(CACHE);
    return;
  }
  onDevice = openOnDevice();
  onDevice.catch((error) => showStatus("noModel", { reason: error.message }, { isError: true }));
  if ("serviceWorker" in navigator) await navigator.serviceWorker.register("service-worker.js").catch(() => {});
  await keep("v1/model", new Response(JSON.stringify(model), { headers: { "Content-Type": "application/json" } }));
  await forgetOldModels();
}

async function forgetOldModels() {
  if (!("caches" in window)) return;
  const cache = await caches.open(CACHE);
  for (const { url } of await cache.keys()) {
    if (url.includes("/v1/model.onnx?") && !url.endsWith(modelFile())) await cache.delete(url);
  }
}

async function predict(file) {
  if (onDevice) return (await onDevice)(file);
  const form = new FormData();
  form.append("file", file, "photo");
  return request("v1/predict", form);
}

async function recognize(file) {
  const number = ++latest;
  photo = file;
  prediction = null;
  element("result").hidden = true;
  hideCorrection();
  URL.revokeObjectURL(element("preview").src);
  element("preview").src = URL.createObjectURL(file);
  element("preview").hidden = stream !== null; // the camera shows what the photo shows
  showStatus("looking");
  try {
    const answer = await predict(file);
    if (number !== latest) return;
    prediction = answer;
    showStatus(onDevice ? "onDevice" : null);
    showPrediction();
  } catch (error) {
    if (number === latest) showError(error);
  }
}

async function correct(event) {
  event.preventDefault();
  const form = new FormData();
  form.append("product", element("product-input").value);
  form.append("file", photo, "photo");
  element("send-button").disabled = true;
  showStatus("sending");
  try {
    const { status, learned } = await request("v1/corrections", form);
    hideCorrection();
    element("wrong-button").hidden = true;
    showStatus(learned ? "learned" : status);
    element("status").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (error instanceof Refusal && error.status === 422) showStatus("failed", { reason: error.message }, { isError: true });
    else showError(error);
  } finally {
    element("send-button").disabled = false;
  }
}

function suggestProducts() {
  const typed = element("product-input").value.trim().toLowerCase();
  const found = (model?.products ?? []).filter((product) => product.toLowerCase().includes(typed));
  element("products").replaceChildren(
    ...found.slice(0, MAX_SUGGESTIONS).map((product) => {
      const option = document.createElement("option");
      option.value = product;
      return option;
    }),
  );
}

function toggleCorrection() {
  const form = element("correction-form");
  form.hidden = !form.hidden;
  element("wrong-button").setAttribute("aria-expanded", String(!form.hidden));
  if (!form.hidden) {
    suggestProducts();
    element("product-input").focus();
  }
}

async function startCamera() {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    showStatus("noCamera", {}, { isError: true });
    return;
  }
  element("camera-view").srcObject = stream;
  element("camera").hidden = false;
  element("preview").hidden = true;
  element("shutter-button").focus();
}

function stopCamera() {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = null;
  element("camera").hidden = true;
  element("preview").hidden = photo === null;
}

function shutter() {
  const view = element("camera-view");
  const canvas = document.createElement("canvas");
  canvas.width = view.videoWidth;
  canvas.height = view.videoHeight;
  if (!canvas.width) return; // the camera has not started yet
  canvas.getContext("2d").drawImage(view, 0, 0);
  canvas.toBlob((blob) => recognize(blob), "image/jpeg", 0.92);
}

function chosen(event) {
  const [file] = event.target.files;
  event.target.value = ""; // so that the same photo can be chosen again
  if (file) recognize(file);
}

async function start() {
  const wanted = stored("language") ?? navigator.language.slice(0, 2);
  language = wanted in TEXTS ? wanted : "en";
  showLanguage();
  element("language-button").addEventListener("click", () => {
    language = text("otherLanguage");
    stored("language", language);
    showLanguage();
  });
  for (const kind of ["take", "choose"]) {
    element(`${kind}-button`).addEventListener("click", () => element(`${kind}-input`).click());
    element(`${kind}-input`).addEventListener("change", chosen);
  }
  element("camera-button").hidden = !navigator.mediaDevices?.getUserMedia; // browsers offer it on HTTPS and localhost
  element("camera-button").addEventListener("click", startCamera);
  element("shutter-button").addEventListener("click", shutter);
  element("stop-button").addEventListener("click", stopCamera);
  element("wrong-button").addEventListener("click", toggleCorrection);
  element("product-input").addEventListener("input", suggestProducts);
  element("correction-form").addEventListener("submit", correct);
  try {
    model = await request("v1/model");
    if (prediction) showPrediction();
    await prepareDevice();
  } catch (error) {
    showError(error);
  }
}

start();
