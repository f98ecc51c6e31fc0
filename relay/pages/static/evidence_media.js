// Pictures and films of an opened message: only by a click, blurred, by a second click clear; none at all where a minor may be
// concerned. A file that lies elsewhere is fetched only after a warning, since its server learns of it. Nothing is stored.
"use strict";

const relayMedia = (() => {
  const MAX_MEDIA_BYTES = 100 * 1024 * 1024, MAX_URL = 600;
  const PICTURES = new Set(["image/jpeg", "image/png", "image/gif", "image/webp", "image/avif"]);
  const FILMS = new Set(["video/mp4", "video/webm", "video/ogg"]);
  const shownUrls = new Set();
  let running = new AbortController();

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") made.className = value; else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  const addressOf = (url) => /^mxc:\/\/([^/\s]+)\/([^/\s]+)$/.exec(url.length <= MAX_URL ? url : "");
  const isShown = (type) => PICTURES.has(type) || FILMS.has(type);

  /* The offer for one named file. `how` is {minor, server, send, named}: `send(step, fields, signal)` asks the relay. */
  function offer(item, role, file, type, how) {
    const place = element("div", { class: "stack media" });
    const address = addressOf(file.url);
    if (!address) return element("p", { class: "small" }, `The message names a ${role} by an address that is none.`);
    how.named.add(file.url);
    const checked = (Array.isArray(item.media) ? item.media : []).find((one) => one?.role === role);
    place.append(element("p", { class: "small" }, `A ${role} is attached: `, element("code", {}, file.url), typeof checked?.state === "string" ? ` (${checked.state})` : ""));
    if (how.minor) {
      place.append(element("p", { class: "note bad" }, "It is not shown: this case may concern a minor."));
      return place;
    }
    if (!isShown(type)) {
      place.append(element("p", { class: "small" }, "A file of this kind is not shown here, and not fetched."));
      return place;
    }
    const button = element("button", { type: "button" }, `Show the ${role}, blurred`);
    button.addEventListener("click", () => show(place, button, file, type, address[1], how));
    place.append(element("div", { class: "row" }, button));
    return place;
  }

  async function show(place, button, file, type, server, how) {
    button.disabled = true;
    const remark = element("p", { class: "small", role: "status" }, "Fetching …");
    place.append(remark);
    try {
      const answer = await how.send("media", { url: file.url }, running.signal);
      if (answer.status === 404 && server !== how.server) {
        remark.remove();
        place.append(warning(place, button, file, type, server, how));
        return;
      }
      if (answer.status === 404) throw new Error("This relay does not have the file any more.");
      await put(place, button, remark, answer, file, type);
    } catch (error) {
      remark.textContent = error.message;
      button.disabled = false;
    }
  }

  function warning(place, button, file, type, server, how) {
    const fetches = element("button", { type: "button", class: "danger" }, `Fetch it from ${server}`);
    const leaves = element("button", { type: "button" }, "Leave it");
    const box = element("div", { class: "note warn stack", role: "group", "aria-label": "The file lies elsewhere" },
      element("p", {}, `This relay does not hold the file: it lies on ${server}. `,
        element("strong", {}, "If you fetch it, that server learns that somebody here looks at this file, and when."),
        " Whoever runs it may tell the sender, who may guess who reported. It is fetched once, for you alone, and not kept. That you did it stands in the audit log."),
      element("div", { class: "row" }, fetches, leaves));
    leaves.addEventListener("click", () => { box.remove(); button.disabled = false; button.focus(); });
    fetches.addEventListener("click", async () => {
      fetches.disabled = leaves.disabled = true;
      const remark = element("p", { class: "small", role: "status" }, `Asking ${server} …`);
      box.append(remark);
      try {
        const answer = await how.send("fetch-media", { url: file.url, sure: "yes" }, running.signal);
        if (!answer.ok) throw new Error(`${server} did not give the file: it may be gone there, or the server is shut out here.`);
        await put(place, button, remark, answer, file, type);
        box.remove();
      } catch (error) {
        remark.textContent = error.message;
        fetches.disabled = leaves.disabled = false;
      }
    });
    return box;
  }

  async function put(place, button, remark, answer, file, type) {
    if (!answer.ok) throw new Error("The relay did not hand out the file.");
    const plain = await decrypted(await bytesOf(answer), file);
    const url = URL.createObjectURL(new Blob([plain], { type }));
    shownUrls.add(url);
    const made = blurred(url, type);
    place.append(made);
    remark.remove();
    button.parentElement.remove();
    made.querySelector("button").focus();
  }

  async function bytesOf(answer) {
    const parts = [];
    let size = 0;
    for (const reader = answer.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      size += value.length;
      if (size > MAX_MEDIA_BYTES) { await reader.cancel(); throw new Error("The file is too large to be shown here."); }
      parts.push(value);
    }
    return new Uint8Array(await new Blob(parts).arrayBuffer());
  }

  /* With the key from the opened evidence; only what the message itself names by its hash. */
  async function decrypted(ciphertext, file) {
    const { fromBase64 } = relayKeys;
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", ciphertext));
    const told = fromBase64(file.hashes?.sha256);
    if (told.length !== 32 || hash.some((byte, at) => byte !== told[at])) throw new Error("The file is not the one that the message names.");
    const key = await crypto.subtle.importKey("raw", fromBase64(file.key?.k), "AES-CTR", false, ["decrypt"]);
    return crypto.subtle.decrypt({ name: "AES-CTR", counter: fromBase64(file.iv), length: 64 }, key, ciphertext);
  }

  function blurred(url, type) {
    const shown = PICTURES.has(type)
      ? element("img", { src: url, alt: "the attached picture", class: "blurred", draggable: "false" })
      : element("video", { src: url, class: "blurred", controls: "", preload: "metadata", controlslist: "nodownload", disablepictureinpicture: "" });
    shown.addEventListener("contextmenu", (event) => event.preventDefault());
    const clear = element("button", { type: "button", "aria-pressed": "false" }, "Take the blur away");
    clear.addEventListener("click", () => {
      const hidden = shown.classList.toggle("blurred");
      clear.textContent = hidden ? "Take the blur away" : "Blur it again";
    });
    shown.addEventListener("error", () => { clear.disabled = true; clear.textContent = "It can't be shown: it is no picture or film of this kind"; });
    return element("div", {}, element("div", { class: "veil" }, shown), element("div", { class: "row" }, clear));
  }

  /* Everything that is shown or on its way goes. */
  function close() {
    running.abort();
    running = new AbortController();
    for (const url of shownUrls) URL.revokeObjectURL(url);
    shownUrls.clear();
  }

  return { element, offer, close };
})();
