"use strict";

// Keeps the page and the model, so that products are named with the network cut. Only --in-browser registers it.

const CACHE = "fedshelf-1";
const PAGE = [
  "./",
  "page.css",
  "page.js",
  "in-browser.js",
  "runtime/ort.wasm.min.mjs",
  "runtime/ort-wasm-simd-threaded.mjs",
  "runtime/ort-wasm-simd-threaded.wasm",
];

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(PAGE)));
  self.skipWaiting();
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET") event.respondWith(answer(event.request));
});

// From the server if it answers. The model's address has its digest in it, so a kept one is never old.
async function answer(request) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request);
  if (kept && request.url.includes("/v1/model.onnx?")) return kept;
  try {
    const found = await fetch(request);
    if (found.ok && kept) await cache.put(request, found.clone());
    return found;
  } catch (error) {
    if (kept) return kept;
    throw error;
  }
}
