// Opens a case's envelopes in the moderator's browser. The key lies here under a passphrase; text and key never go to the relay.
// What is opened is checked once more here (evidence_checks.js); files are shown by evidence_media.js.
"use strict";

(() => {
const { openEnvelope, sealEnvelope, readPublic, requireBrowser, unlockKey, fromBase64, toBase64 } = relayKeys;
const { element } = relayMedia;

const KEY = "relay.moderator.key";
const SHARED_WORDS = 5, MAX_ITEMS = 40;

const card = document.getElementById("evidence-card");
const says = document.getElementById("evidence-says");
const opened = document.getElementById("opened");
const cases = (card?.dataset.cases ?? "").split(" ");
const about = { event: card?.dataset.event ?? "", person: card?.dataset.person ?? "", server: card?.dataset.server ?? "" };
const texts = [];
const named = new Set();
const files = { minor: card?.dataset.category === "minor", server: about.server, named, send };

function say(text, tone = "bad") {
  says.textContent = text;
  says.className = `note ${tone}`;
  says.hidden = !text;
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
    await requireBrowser();
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
      await show(one, plaintext);
    } catch (error) {
      failed.push(error.message || "An envelope could not be opened.");
    }
  }
  say(failed.join(" "), "warn");
  if (!failed.length) says.hidden = true;
  if (!envelopes.some((one) => !one.forgotten)) say("There is nothing to open any more.", "");
  // So that the page's keys work again.
  opened.focus();
}

function send(step, fields = {}, signal = undefined) {
  const form = document.getElementById("open-evidence");
  const body = new URLSearchParams({ form: form.elements.form.value, ...fields });
  return fetch(form.getAttribute("action").replace(/evidence$/, step), { method: "POST", body, redirect: "error", signal });
}

// --- showing

/* A text of somebody's, with what can't be seen in it named. */
function said(text, name = "div", kind = "said") {
  const { nodes, marks } = relayChecks.visible(text);
  const made = element(name, { class: kind, dir: "auto" }, ...nodes);
  return marks ? [made, element("p", { class: "small" }, `This text holds ${marks} sign${marks === 1 ? "" : "s"} that can't be seen, or that turn its direction round; marked as [number].`)] : [made];
}

async function show(envelope, plaintext) {
  const text = textOf(plaintext);
  let value = null;
  try { value = JSON.parse(text); } catch { /* plain words */ }
  if (envelope.kind === "forward") showHandedOver(text);
  else if (envelope.kind === "evidence" && value && Array.isArray(value.items)) {
    for (const item of value.items.slice(0, MAX_ITEMS)) {
      try {
        await showMessage(item);
      } catch (_) {
        opened.append(element("div", { class: "opened doubtful" }, element("p", {}, "A message in this envelope is not one: it can't be shown. Tell your operator.")));
      }
    }
    if (value.items.length > MAX_ITEMS) say(`Only the first ${MAX_ITEMS} messages of this envelope are shown.`, "warn");
  }
  else {
    const words = value && typeof value === "object" ? Object.entries(value).filter(([, v]) => typeof v === "string" && v) : [["", text]];
    const box = element("div", { class: "opened" }, element("p", { class: "small" }, kindOf(envelope.kind)));
    for (const [name, spoken] of words) {
      if (name && words.length > 1) box.append(element("p", { class: "small" }, name.replace(/_/g, " ")));
      box.append(...said(spoken));
      texts.push(spoken);
    }
    opened.append(box);
  }
}

const kindOf = (kind) => ({ words: "The reporter's own words", answer: "An answer", appeal: "An appeal", note: "A moderator's note" })[kind] ?? kind;

const textOr = (value, otherwise = "") => (typeof value === "string" ? value : otherwise);

async function showMessage(item) {
  const box = element("div", { class: "opened" });
  const when = Number.isSafeInteger(item.origin_server_ts) ? new Date(item.origin_server_ts).toLocaleString() : "";
  box.append(element("p", { class: "small" }, element("span", { class: "id" }, textOr(item.sender, "no sender")), ` ${when}`));
  if (typeof item.plaintext === "string" && item.plaintext) {
    const { list, holds } = await relayChecks.found(item, about);
    if (!holds) box.classList.add("doubtful");
    const raw = textOf(fromBase64(item.plaintext));
    let inner = null;
    try { inner = JSON.parse(raw); } catch { /* shown as it is */ }
    const content = inner && typeof inner.content === "object" && inner.content ? inner.content : {};
    const body = typeof content.body === "string" ? content.body : "";
    box.append(...said(body || raw), list);
    texts.push(body || raw);
    box.append(element("details", {}, element("summary", {}, "Everything that was sent"), ...said(raw, "pre", "said mono")));
    for (const [role, file, info] of [["file", content.file, content.info], ["thumbnail", content.info?.thumbnail_file, content.info?.thumbnail_info]]) {
      if (!file || typeof file.url !== "string") continue;
      const target = document.getElementById("media-target");
      if (target && role === "file" && !target.value) target.value = file.url;
      box.append(relayMedia.offer(item, role, file, textOr(info?.mimetype), files));
    }
    if (typeof content.url === "string") box.append(element("p", { class: "small" }, "The message names a file that is not encrypted. Nothing proves what lies there, so it is not shown here."));
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
  const sender = textOr(item.sender);
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

function closeAll() {
  opened?.replaceChildren();
  texts.length = 0;
  relayMedia.close();
}

// --- reasons are the moderator's own words

const wordsOf = (text) => relayChecks.bare(text).toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];

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
