// Opens a case's envelopes in the moderator's browser. The key lies here under a passphrase; text and key never go to the relay.
// Pictures and films: only by a second click, blurred, never stored, and none at all where a minor may be concerned.
"use strict";

(() => {
const { openEnvelope, sealEnvelope, readPublic, unlockKey, fromBase64, toBase64 } = relayKeys;

const KEY = "relay.moderator.key";
const SHARED_WORDS = 5;
const MAX_MEDIA_BYTES = 100 * 1024 * 1024;
const PICTURES = new Set(["image/jpeg", "image/png", "image/gif", "image/webp", "image/avif"]);
const FILMS = new Set(["video/mp4", "video/webm", "video/ogg"]);

const card = document.getElementById("evidence-card");
const says = document.getElementById("evidence-says");
const opened = document.getElementById("opened");
const cases = (card?.dataset.cases ?? "").split(" ");
const texts = [];
const named = new Set();
const shownUrls = new Set();

function say(text, tone = "bad") {
  says.textContent = text;
  says.className = `note ${tone}`;
  says.hidden = !text;
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value; else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const textOf = (bytes) => new TextDecoder().decode(bytes);

// --- opening

async function open() {
  const stored = localStorage.getItem(KEY);
  if (!stored) {
    say("This browser has no moderator key yet. Put it in on the page Keys, then come back.");
    return;
  }
  const passphrase = document.getElementById("passphrase");
  say("Opening …", "");
  let key;
  try {
    key = await unlockKey(JSON.parse(stored), passphrase.value);
  } catch (error) {
    say(error.message || "The passphrase does not open your key. Try again.");
    passphrase.select();
    return;
  }
  passphrase.value = "";
  const answer = await send("evidence");
  if (!answer.ok) { say("The relay did not hand out the envelopes. Load the page again."); return; }
  const envelopes = (await answer.json()).envelopes;
  opened.replaceChildren();
  texts.length = 0;
  const failed = [];
  for (const one of envelopes) {
    if (one.forgotten) continue;
    try {
      if (!cases.includes(one.case_id)) throw new Error("The relay handed out the envelope of another case. Tell your operator.");
      const plaintext = await openEnvelope(key, one, one.case_id, one.version);
      show(one, plaintext);
    } catch (error) {
      failed.push(error.message || "An envelope could not be opened.");
    }
  }
  say(failed.join(" "), "warn");
  if (!failed.length) says.hidden = true;
  // So that the page's keys work again.
  opened.focus();
}

function send(step, fields = {}) {
  const form = document.getElementById("open-evidence");
  const body = new URLSearchParams({ form: form.elements.form.value, ...fields });
  return fetch(form.getAttribute("action").replace(/evidence$/, step), { method: "POST", body, redirect: "error" });
}

// --- showing

function show(envelope, plaintext) {
  const text = textOf(plaintext);
  let value = null;
  try { value = JSON.parse(text); } catch { /* plain words */ }
  if (envelope.kind === "forward") showHandedOver(text);
  else if (value && Array.isArray(value.items)) value.items.forEach(showMessage);
  else {
    const words = value && typeof value === "object" ? Object.entries(value).filter(([, v]) => typeof v === "string" && v) : [["", text]];
    const box = element("div", { class: "opened" }, element("p", { class: "small" }, kindOf(envelope.kind)));
    for (const [name, said] of words) {
      if (name && words.length > 1) box.append(element("p", { class: "small" }, name.replace(/_/g, " ")));
      box.append(element("div", { class: "said" }, said));
      texts.push(said);
    }
    opened.append(box);
  }
}

const kindOf = (kind) => ({ words: "The reporter's own words", answer: "An answer", appeal: "An appeal", note: "A moderator's note" })[kind] ?? kind;

function showMessage(item) {
  const box = element("div", { class: "opened" });
  const when = item.origin_server_ts ? new Date(item.origin_server_ts).toLocaleString() : "";
  box.append(element("p", { class: "small" }, element("span", { class: "id" }, item.sender ?? ""), ` ${when}`));
  if (item.plaintext) {
    const raw = textOf(fromBase64(item.plaintext));
    let inner = null;
    try { inner = JSON.parse(raw); } catch { /* shown as it is */ }
    const content = inner && typeof inner.content === "object" && inner.content ? inner.content : {};
    const body = typeof content.body === "string" ? content.body : "";
    box.append(element("div", { class: "said" }, body || raw));
    texts.push(body || raw);
    box.append(element("details", {}, element("summary", {}, "Everything that was sent"), element("pre", { class: "said mono" }, raw)));
    for (const [role, file, info] of [["file", content.file, content.info], ["thumbnail", content.info?.thumbnail_file, content.info?.thumbnail_info]]) {
      if (file && typeof file.url === "string") box.append(mediaOffer(item, role, file, String(info?.mimetype ?? "")));
    }
  } else {
    box.append(element("p", { class: "small" }, "This message was not opened."));
  }
  const offer = forwardOffer(item);
  if (offer) box.append(offer);
  opened.append(box);
}

// --- handing over to another server's moderators, and what was handed over by them

const serverOf = (userId) => userId.slice(userId.indexOf(":") + 1);

function forwardOffer(item) {
  const sender = String(item.sender ?? "");
  const proved = item.plaintext && ["verified", "verified_remote"].includes(item.result) && card.dataset.forward === "yes";
  if (!proved || serverOf(sender) === serverOf(card.dataset.me)) return null;
  const button = element("button", { type: "button" }, `Hand this proof to the moderators of ${serverOf(sender)}`);
  let asked = false;
  button.addEventListener("click", async () => {
    if (!asked) {
      asked = true;
      button.textContent = "Sure? They will read this message. Who reported it is not named.";
      return;
    }
    button.disabled = true;
    try {
      const answer = await send("peer-keys", { server: serverOf(sender) });
      if (!answer.ok) throw new Error("Their relay gave no keys to seal to. It may take no reports; turn to its operator.");
      const keys = await Promise.all((await answer.json()).keys.map((one) => readPublic(one.public)));
      const name = toBase64(crypto.getRandomValues(new Uint8Array(16))).replace(/\+/g, "-").replace(/\//g, "_");
      const told = { v: 1, alg: "m.megolm.v1.aes-sha2", good_faith: true, items: [{ event_id: item.event_id, index: item.index, prk: item.prk }] };
      const sealed = await sealEnvelope(new TextEncoder().encode(JSON.stringify(told)), name, 1, keys);
      const done = await send("forward", { event_id: item.event_id, envelope: JSON.stringify(sealed) });
      if (!done.ok) throw new Error("Their relay did not take it. It may have been handed over before.");
      button.textContent = "Handed over. Their answer will stand in the history.";
    } catch (error) {
      say(error.message);
      button.textContent = "Not handed over";
    }
  });
  return button;
}

function showHandedOver(text) {
  const button = element("button", { type: "button", class: "primary" }, "Check this proof");
  button.addEventListener("click", async () => {
    button.disabled = true;
    const answer = await send("proof", { disclosure: text });
    if (answer.ok) location.reload(); else say("The relay could not check it. Load the page again.");
  });
  opened.append(element("div", { class: "opened stack" },
    element("p", {}, "Handed over by another relay's moderators. The proof is checked against what lies here; then you can read the message."), button));
}

// --- media: by a second click

function mediaOffer(item, role, file, type) {
  const place = element("div", { class: "stack" });
  named.add(file.url);
  const checked = (item.media ?? []).find((one) => one.role === role);
  place.append(element("p", { class: "small" }, `A ${role} is attached: `, element("code", {}, file.url), checked ? ` (${checked.state})` : ""));
  const target = document.getElementById("media-target");
  if (target && role === "file" && !target.value) target.value = file.url;
  if (card.dataset.category === "minor") {
    place.append(element("p", { class: "note bad" }, "It is not shown: this case may concern a minor."));
    return place;
  }
  const button = element("button", { type: "button" }, `Show the ${role}, blurred`);
  button.addEventListener("click", () => showMedia(place, button, item, file, type), { once: true });
  place.append(button);
  return place;
}

async function showMedia(place, button, item, file, type) {
  button.disabled = true;
  const remark = element("p", { class: "small", role: "status" }, "Fetching …");
  place.append(remark);
  try {
    const answer = await send("media", { url: file.url, event_id: item.event_id });
    if (answer.status === 404) throw new Error("This relay does not hold the file. It is not fetched from elsewhere, since that would tell the sender's server.");
    if (!answer.ok) throw new Error("The relay did not hand out the file.");
    const ciphertext = new Uint8Array(await answer.arrayBuffer());
    if (ciphertext.length > MAX_MEDIA_BYTES) throw new Error("The file is too large to be shown here.");
    const url = URL.createObjectURL(new Blob([await decrypted(ciphertext, file)], { type }));
    shownUrls.add(url);
    place.append(blurred(url, type));
    remark.remove();
    button.remove();
  } catch (error) {
    remark.textContent = error.message;
  }
}

async function decrypted(ciphertext, file) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", ciphertext));
  const told = fromBase64(String(file.hashes?.sha256 ?? ""));
  if (told.length !== 32 || hash.some((byte, at) => byte !== told[at])) throw new Error("The file is not the one that the message names.");
  const key = await crypto.subtle.importKey("raw", fromBase64(file.key.k), "AES-CTR", false, ["decrypt"]);
  return crypto.subtle.decrypt({ name: "AES-CTR", counter: fromBase64(file.iv), length: 64 }, key, ciphertext);
}

function blurred(url, type) {
  let shown;
  if (PICTURES.has(type)) shown = element("img", { src: url, alt: "the attached picture", class: "blurred", draggable: "false" });
  else if (FILMS.has(type)) shown = element("video", { src: url, class: "blurred", controls: "", preload: "metadata", controlslist: "nodownload", disablepictureinpicture: "" });
  else return element("p", { class: "small" }, "A file of this kind is not shown here.");
  shown.addEventListener("contextmenu", (event) => event.preventDefault());
  const clear = element("button", { type: "button" }, "Take the blur away");
  clear.addEventListener("click", () => { clear.textContent = shown.classList.toggle("blurred") ? "Take the blur away" : "Blur it again"; });
  return element("div", {}, element("div", { class: "veil" }, shown), element("div", { class: "row" }, clear));
}

function closeAll() {
  opened?.replaceChildren();
  for (const url of shownUrls) URL.revokeObjectURL(url);
  shownUrls.clear();
}

// --- reasons are the moderator's own words

const wordsOf = (text) => text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];

function shared(facts) {
  const mine = wordsOf(facts);
  const runs = new Set();
  for (const text of texts) {
    const theirs = wordsOf(text);
    for (let at = 0; at + SHARED_WORDS <= theirs.length; at += 1) runs.add(theirs.slice(at, at + SHARED_WORDS).join(" "));
  }
  for (let at = 0; at + SHARED_WORDS <= mine.length; at += 1) {
    const run = mine.slice(at, at + SHARED_WORDS).join(" ");
    if (runs.has(run)) return run;
  }
  return null;
}

for (const form of document.querySelectorAll("form[data-facts]")) {
  form.addEventListener("submit", (event) => {
    const warning = form.querySelector("[data-facts-warning]");
    const run = shared(form.querySelector("[data-facts-text]").value);
    warning.hidden = run === null;
    if (run !== null) {
      event.preventDefault();
      event.stopPropagation();
      warning.textContent = `“${run}” stands in the evidence. Reasons are kept and sent to both sides, so say it in your own words.`;
    }
  });
}

// --- the page

// The address of a file stands inside the ciphertext: it goes to the relay only where the file is to be quarantined.
document.querySelector("form[action$='/decide']")?.addEventListener("submit", (event) => {
  const quarantine = event.target.querySelector("input[value=quarantine]");
  const target = document.getElementById("media-target");
  if (target && !quarantine?.checked) target.value = "";
});

for (const one of document.querySelectorAll(".needs-script")) one.hidden = false;
document.getElementById("open")?.addEventListener("click", open);
document.getElementById("passphrase")?.addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.preventDefault(); open(); }
});
document.querySelector("form[action$='/minor']")?.addEventListener("submit", (event) => {
  for (const url of named) event.target.append(element("input", { type: "hidden", name: "file", value: url }));
  closeAll();
});
window.addEventListener("pagehide", closeAll);
})();
