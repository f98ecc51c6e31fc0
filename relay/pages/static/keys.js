// The moderator's key in this browser: put in or made here, kept under a passphrase, proved now and then. It never leaves.
"use strict";

(() => {
  const KEY = "relay.moderator.key", PINNED = "relay.moderator.list";
  const MIN_PASSPHRASE = 12, MAX_REWRAPPED = 100_000;
  const at = (id) => document.getElementById(id);

  function say(text, tone = "bad") {
    at("key-says").textContent = text;
    at("key-says").className = `note ${tone}`;
    at("key-says").hidden = !text;
  }

  function stored() {
    try { return JSON.parse(localStorage.getItem(KEY)); } catch { return null; }
  }

  function showState() {
    const key = stored();
    const listed = key && document.querySelector(`[data-key-id="${CSS.escape(key.key_id)}"]`);
    at("test-key").hidden = !key;
    at("no-key").hidden = Boolean(key);
    if (!key) at("key-state").textContent = "This browser holds no key: it can't open evidence yet.";
    else if (listed) at("key-state").textContent = `This browser holds the key ${key.key_id.slice(0, 12)}…`;
    else at("key-state").textContent = `This browser holds the key ${key.key_id.slice(0, 12)}…, which is not in the relay's list: nothing is sealed to it.`;
  }

  function passphrase() {
    const [one, again] = [at("passphrase").value, at("passphrase-again").value];
    if (one.length < MIN_PASSPHRASE) throw new Error(`Take a passphrase of at least ${MIN_PASSPHRASE} characters: several words are best.`);
    if (one !== again) throw new Error("The two passphrases differ. Type them again.");
    return one;
  }

  async function keep(key) {
    say("Locking it under the passphrase …", "");
    localStorage.setItem(KEY, JSON.stringify(await relayKeys.lockKey(key, passphrase())));
    for (const id of ["secret", "passphrase", "passphrase-again"]) at(id).value = "";
    say("Kept in this browser, under your passphrase.", "good");
    showState();
  }

  async function post(step, fields) {
    const body = new URLSearchParams({ form: at("test-key").elements.form.value, ...fields });
    const answer = await fetch(`/_relay/desk/keys/${step}`, { method: "POST", body, redirect: "error" });
    if (!answer.ok) throw new Error("The relay did not take this. Load the page again; perhaps the key is not yours in its list.");
    return answer.json();
  }

  async function prove() {
    say("Opening a test envelope …", "");
    const key = await relayKeys.unlockKey(stored(), at("test-passphrase").value);
    at("test-passphrase").value = "";
    const envelope = await post("test", { key_id: key.keyId });
    // Else the answer would let the relay guess at what stands in some other envelope.
    if (!/^test-[0-9a-f]+$/.test(String(envelope?.case_id))) throw new Error("The relay asked to open something that is no test. Tell your operator.");
    await post("tested", { key_id: key.keyId, answer: await relayKeys.answerTest(key, envelope) });
    const more = await rewrap(key);
    const opened = more ? ` ${more} older texts can now be opened with keys that came later.` : "";
    say(`It opens. The relay asks again in 90 days.${opened}`, "good");
  }

  // What was sealed before a key came is wrapped for it here: only for keys of the list that this browser has followed,
  // whatever the relay asks for.
  async function rewrap(key) {
    const list = await checkList();
    if (!list) return 0;
    const counting = relayKeys.counting(list, Date.now());
    let done = 0;
    while (done < MAX_REWRAPPED) {
      const { envelopes } = await post("unwrapped", { key_id: key.keyId });
      if (!envelopes.length) return done;
      for (const one of envelopes) {
        const wraps = await relayKeys.rewrapEnvelope(key, one, counting.filter((other) => one.lacks.includes(other.key_id)));
        const { added } = await post("wraps", { envelope_id: one.id, wraps: JSON.stringify(wraps) });
        if (!added) return done;
        done += 1;
        say(`Making older texts readable for newer keys … ${done}`, "");
      }
    }
    return done;
  }

  async function checkList() {
    await relayKeys.requireBrowser();
    const answer = await fetch("/_relay/desk/keys/list", { redirect: "error" });
    if (!answer.ok) return null;
    const { lists } = await answer.json();
    if (!lists.length) return null;
    const newest = await relayKeys.followChain(localStorage.getItem(PINNED), lists);
    localStorage.setItem(PINNED, await relayKeys.listDigest(newest));
    return newest;
  }

  const doing = (what) => async (event) => {
    event.preventDefault();
    event.stopPropagation();
    try { await relayKeys.requireBrowser(); await what(event); } catch (error) { say(error.message || "That did not work."); }
  };

  at("put-key").addEventListener("submit", doing(async () => keep(await relayKeys.readSecret(at("secret").value))));
  at("make-key").addEventListener("click", doing(async () => {
    passphrase();
    const key = await relayKeys.makeKey();
    await keep(key);
    at("made-secret").textContent = await relayKeys.secretText(key);
    at("made-public").textContent = await relayKeys.publicText(key);
    at("made").hidden = false;
  }));
  at("prove").addEventListener("click", doing(prove));
  at("test-key").addEventListener("submit", doing(prove));
  // What was not written down is gone for good: the second press does it.
  const removes = at("remove-key"), REMOVE = removes.textContent;
  let surely = false;
  const restore = () => { surely = false; removes.textContent = REMOVE; };
  removes.addEventListener("blur", restore);
  removes.addEventListener("click", (event) => {
    event.preventDefault();
    event.stopPropagation();
    if (!surely) {
      surely = true;
      removes.textContent = "Sure? Only your written copy is left then";
      return;
    }
    restore();
    localStorage.removeItem(KEY);
    say("");
    showState();
  });

  showState();
  checkList().catch((error) => {
    at("list-warning").textContent = error.message;
    at("list-warning").hidden = false;
  });
})();
