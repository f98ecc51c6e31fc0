// What this browser itself finds about an opened message, in words beside what the relay found. Nobody has to believe the relay
// alone: whose text it is follows from the event, its ciphertext and the one value in the envelope (verify.js). And how text
// that hides something is shown: what can't be seen is named.
"use strict";

const relayChecks = (() => {
  // What each step says where it holds, and where it does not. The numbers are those of docs/reports.md.
  const STEPS = {
    V2: "it is no encrypted message",
    V3: "the ciphertext is not the one whose hash the event carries",
    V4: "the event is another than it says: its ID, sender or room does not fit",
    V6: "the ciphertext can't be read as a message of this session and place",
    V7: "the signature of the sender's session does not hold",
    V8: "the value in the envelope does not belong to this ciphertext",
    V9: "the text shown is not what the ciphertext opens to",
    V10: "what it opens to is not a message of this room, or names something twice",
  };
  const SAID = {
    verified: "verified", verified_remote: "verified, on the word of the sender's own server", invalid: "does not fit",
    needs_human: "needs a person to look at it", undisclosed: "not opened",
  };

  const line = (text, tone = "") => {
    const made = document.createElement("li");
    made.className = tone;
    made.textContent = text;
    return made;
  };
  const has = (table, key) => (typeof key === "string" && Object.hasOwn(table, key) ? table[key] : null);

  /* A list of findings for one opened item; `about` is {event, person, server} of the case. */
  const found = async (item, about) => {
    const list = document.createElement("ul");
    list.className = "checks";
    list.setAttribute("aria-label", "Checks of this message");
    const step = await relayVerify.item(item);
    const relaySays = has(SAID, item.result) ?? "nothing that this page knows";
    const good = item.result === "verified" || item.result === "verified_remote";
    if (step === null) {
      list.append(line("Checked again in this browser: this text is exactly what the encrypted event holds, from this sender, in this room."));
    } else {
      list.append(line(`Checked again in this browser: it does not hold, since ${has(STEPS, step) ?? "a check failed"} (${step}).`, "bad"));
    }
    list.append(line(`The relay's own checks: ${relaySays}${typeof item.step === "string" ? ` (${item.step})` : ""}.`, good ? "" : "warn"));
    if (good && step !== null) {
      list.append(line("The two disagree. Don't decide by this text: download the envelopes, open them with “relay desk open” on another machine, and tell your operator.", "bad"));
    }
    if (step === null) {
      const sender = item.sender;  // a string, since V4 holds
      const server = sender.slice(sender.indexOf(":") + 1);
      list.append(line(server === about.server
        ? "That the account sent it is known to the relay alone: it took the event from that account's own session."
        : `That the account sent it is the word of its own server, ${server}, whose signature the relay has checked.`, "warn"));
    }
    if (about.event) {
      list.append(item.event_id === about.event ? line("It is the message that was reported.")
        : line("It is another message than the reported one: context that the reporter added.", "warn"));
    }
    if (about.person && item.sender !== about.person) list.append(line("It was sent by somebody else than the person whom this case is about.", "warn"));
    return { list, holds: step === null };
  };

  // Direction marks, joiners, blanks without width, controls such as those of terminals, tags: what moves or hides text.
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;
  // A joiner between two signs makes one picture of them, and hides nothing.
  const isJoin = (text, at) => text[at] === "\u200d" && /\p{Extended_Pictographic}|\ufe0f/u.test(text.slice(Math.max(0, at - 2), at + 3));
  const MAX_MARKS = 2000, MAX_SHOWN = 200_000;

  /* The text as nodes, with a mark where something can't be seen; and how many such marks there are. */
  const visible = (given) => {
    const text = given.slice(0, MAX_SHOWN);
    const nodes = [];
    let from = 0, marks = 0;
    for (const match of text.matchAll(UNSEEN)) {
      if (marks >= MAX_MARKS) break;
      if (isJoin(text, match.index)) continue;
      marks += 1;
      const mark = document.createElement("span");
      mark.className = "unseen";
      mark.textContent = `[${match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`;
      nodes.push(text.slice(from, match.index), mark);
      from = match.index + match[0].length;
    }
    // Marks beyond the bound are left out, so that none takes effect.
    nodes.push(text.slice(from).replace(UNSEEN, (one, at, rest) => (isJoin(rest, at) ? one : "")));
    if (given.length > MAX_SHOWN) nodes.push(`\n… ${given.length - MAX_SHOWN} further characters are left out here`);
    return { nodes, marks };
  };
  /* As people read it: for comparing words. */
  const bare = (text) => text.normalize("NFKC").replace(UNSEEN, "");

  return { found, visible, bare };
})();
