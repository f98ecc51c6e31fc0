/* Moderators' keys and sealed envelopes in the browser, with WebCrypto alone: the other half of relay/moderation/envelope.py,
 * moderator_secret.py and key_list.py. Nothing here speaks to the network or touches the page.
 *
 * HPKE (RFC 9180) is written out for the one suite in use: base mode, X25519, HKDF-SHA256, AES-256-GCM, one message a key. */
"use strict";

const relayKeys = (() => {
  const text = new TextEncoder();
  const SECRET_BYTES = 32, KEY_BYTES = 32, SUM_BYTES = 4, GROUP_LETTERS = 6, MIN_KEYS = 2, MAX_LISTED = 64;
  const SECRET_MARK = "rmk1-", PUBLIC_MARK = "rmp1-";
  const LOCK_KDF = "PBKDF2-SHA-512", LOCK_ITERATIONS = 600000, MAX_LOCK_ITERATIONS = 10000000;
  const DAY = 24 * 60 * 60 * 1000;
  const LETTERS = "abcdefghijklmnopqrstuvwxyz234567";

  class Refused extends Error {}

  const join = (...parts) => {
    const made = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) { made.set(part, at); at += part.length; }
    return made;
  };
  const same = (a, b) => a.length === b.length && a.every((byte, at) => byte === b[at]);
  const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

  const toBase64 = (bytes) => {
    let binary = "";
    for (let at = 0; at < bytes.length; at += 8192) binary += String.fromCharCode(...bytes.subarray(at, at + 8192));
    return btoa(binary).replace(/=+$/, "");
  };
  const fromBase64 = (letters) => {
    if (typeof letters !== "string") throw new Refused("This is not base64.");
    try {
      return Uint8Array.from(atob(letters.replace(/-/g, "+").replace(/_/g, "/")), (one) => one.charCodeAt(0));
    } catch (_) {
      throw new Refused("This is not base64.");
    }
  };

  /* Canonical JSON of what this file signs and authenticates: strings, whole numbers, null, arrays, objects. */
  const canonical = (value) => {
    if (Array.isArray(value)) return "[" + value.map(canonical).join(",") + "]";
    if (value !== null && typeof value === "object") {
      return "{" + Object.keys(value).sort().map((key) => JSON.stringify(key) + ":" + canonical(value[key])).join(",") + "}";
    }
    return JSON.stringify(value);
  };

  const sha256 = async (bytes) => new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const hmac = async (key, message) => {
    // An empty HMAC key is one of zeros; WebCrypto takes only the latter.
    const imported = await crypto.subtle.importKey(
      "raw", key.length ? key : new Uint8Array(32), { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
    return new Uint8Array(await crypto.subtle.sign("HMAC", imported, message));
  };
  const expand = async (key, info, length) => {
    let made = new Uint8Array(0), last = made;
    for (let number = 1; made.length < length; number++) {
      last = await hmac(key, join(last, info, Uint8Array.of(number)));
      made = join(made, last);
    }
    return made.subarray(0, length);
  };

  // --- letters

  const toLetters = (bytes) => {
    let bits = 0, held = 0, made = "";
    for (const byte of bytes) {
      held = (held << 8) | byte; bits += 8;
      while (bits >= 5) { made += LETTERS[(held >> (bits - 5)) & 31]; bits -= 5; }
      held &= (1 << bits) - 1;
    }
    if (bits) made += LETTERS[(held << (5 - bits)) & 31];
    return made;
  };
  const fromLetters = (letters) => {
    const made = [];
    let bits = 0, held = 0;
    for (const letter of letters) {
      const value = LETTERS.indexOf(letter);
      if (value < 0) return new Uint8Array(0);
      held = (held << 5) | value; bits += 5;
      if (bits >= 8) { made.push((held >> (bits - 8)) & 255); bits -= 8; }
      held &= (1 << bits) - 1;
    }
    return Uint8Array.from(made);
  };
  const sumOf = async (bytes) => (await sha256(join(text.encode("relay check sum"), bytes))).subarray(0, SUM_BYTES);
  const written = async (mark, bytes) =>
    mark + toLetters(join(bytes, await sumOf(bytes))).match(new RegExp(`.{1,${GROUP_LETTERS}}`, "g")).join("-");
  const readWritten = async (given, mark, size, what) => {
    const bare = given.replace(/\s+/g, "").toLowerCase();
    if (!bare.startsWith(mark)) throw new Refused(`This is not ${what}: that begins with ${mark}. Copy the whole line.`);
    const bytes = fromLetters(bare.slice(mark.length).replace(/-/g, ""));
    const raw = bytes.subarray(0, size);
    if (bytes.length !== size + SUM_BYTES || !same(await sumOf(raw), bytes.subarray(size))) {
      throw new Refused(`There is a slip in ${what}: its check sum is wrong. Copy the whole line again.`);
    }
    return raw;
  };

  // --- keys

  const PKCS8 = (curve) => Uint8Array.of(0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, curve, 4, 0x22, 4, 0x20);
  const derived = async (raw, info) => {
    const key = await crypto.subtle.importKey("raw", raw, "HKDF", false, ["deriveBits"]);
    const how = { name: "HKDF", hash: "SHA-256", salt: new Uint8Array(0), info: text.encode(info) };
    return new Uint8Array(await crypto.subtle.deriveBits(how, key, 256));
  };
  const keyIdOf = async (sealKey, signKey) =>
    hex(await sha256(join(text.encode("relay moderator key id"), sealKey, signKey))).slice(0, 32);

  /* Before anything is asked of her: what this browser lacks would else look like a wrong passphrase. */
  const requireBrowser = async () => {
    if (!crypto.subtle) throw new Refused("A browser opens keys only over https. Open this page by its https:// address.");
    try {
      await crypto.subtle.generateKey({ name: "X25519" }, false, ["deriveBits"]);
      await crypto.subtle.generateKey({ name: "Ed25519" }, false, ["sign", "verify"]);
    } catch (_) {
      throw new Refused("This browser is too old for moderators' keys. Take Firefox 130, Chrome or Edge 137, Safari 17, or a later one.");
    }
  };

  /* The key that follows from 32 secret bytes. Whoever holds this object can open and sign. */
  const keyOf = async (secret) => {
    const make = async (name, curve, info, use) => {
      const pkcs8 = join(PKCS8(curve), await derived(secret, info));
      const key = await crypto.subtle.importKey("pkcs8", pkcs8, { name }, true, [use]);
      return [key, fromBase64((await crypto.subtle.exportKey("jwk", key)).x)];
    };
    const [open, sealKey] = await make("X25519", 0x6e, "relay moderator key v1: seal", "deriveBits");
    const [sign, signKey] = await make("Ed25519", 0x70, "relay moderator key v1: sign", "sign");
    return { secret, open, sign, sealKey, signKey, keyId: await keyIdOf(sealKey, signKey) };
  };
  const makeKey = () => keyOf(crypto.getRandomValues(new Uint8Array(SECRET_BYTES)));
  const secretText = (key) => written(SECRET_MARK, key.secret);
  const publicText = (key) => written(PUBLIC_MARK, join(key.sealKey, key.signKey));
  /* A listed key from the line in which public halves are passed on. */
  const readPublic = async (given) => {
    const raw = await readWritten(given, PUBLIC_MARK, 2 * KEY_BYTES, "the public half of a moderator's key");
    const sealKey = raw.subarray(0, KEY_BYTES), signKey = raw.subarray(KEY_BYTES);
    return { key_id: await keyIdOf(sealKey, signKey), seal_key: toBase64(sealKey), sign_key: toBase64(signKey) };
  };
  const readSecret = async (given) => keyOf(await readWritten(given, SECRET_MARK, SECRET_BYTES, "a moderator's key"));

  const stretched = async (passphrase, salt, iterations) => {
    const key = await crypto.subtle.importKey("raw", text.encode(passphrase), "PBKDF2", false, ["deriveKey"]);
    const how = { name: "PBKDF2", hash: "SHA-512", salt, iterations };
    return crypto.subtle.deriveKey(how, key, { name: "AES-GCM", length: 256 }, false, ["encrypt", "decrypt"]);
  };
  /* What a browser or a file keeps of a key. */
  const lockKey = async (key, passphrase, iterations = LOCK_ITERATIONS) => {
    const salt = crypto.getRandomValues(new Uint8Array(16)), iv = crypto.getRandomValues(new Uint8Array(12));
    const how = { name: "AES-GCM", iv, additionalData: text.encode(key.keyId) };
    const locked = await crypto.subtle.encrypt(how, await stretched(passphrase, salt, iterations), key.secret);
    return {
      v: 1, key_id: key.keyId, public: await publicText(key), kdf: LOCK_KDF, iterations,
      salt: toBase64(salt), iv: toBase64(iv), locked: toBase64(new Uint8Array(locked)),
    };
  };
  const unlockKey = async (stored, passphrase) => {
    const known = stored && stored.v === 1 && stored.kdf === LOCK_KDF && Number.isInteger(stored.iterations);
    if (!known || stored.iterations < 1 || stored.iterations > MAX_LOCK_ITERATIONS) {
      throw new Refused("This is not a moderator's key file of this version.");
    }
    const how = { name: "AES-GCM", iv: fromBase64(stored.iv), additionalData: text.encode(stored.key_id) };
    let secret;
    try {
      const by = await stretched(passphrase, fromBase64(stored.salt), stored.iterations);
      secret = new Uint8Array(await crypto.subtle.decrypt(how, by, fromBase64(stored.locked)));
    } catch (_) {
      throw new Refused("The passphrase does not open this key. Try again.");
    }
    const key = await keyOf(secret);
    if (key.keyId !== stored.key_id) throw new Refused("This key file is damaged. Take your copy of it.");
    return key;
  };

  // --- HPKE

  const KEM = join(text.encode("KEM"), Uint8Array.of(0, 0x20));
  const SUITE = join(text.encode("HPKE"), Uint8Array.of(0, 0x20, 0, 1, 0, 2));
  const NONE = new Uint8Array(0);
  const labeledExtract = (suite, salt, label, ikm) =>
    hmac(salt, join(text.encode("HPKE-v1"), suite, text.encode(label), ikm));
  const labeledExpand = (suite, key, label, info, length) =>
    expand(key, join(Uint8Array.of(length >> 8, length & 255), text.encode("HPKE-v1"), suite, text.encode(label), info), length);
  const importPublic = (raw) => crypto.subtle.importKey("raw", raw, { name: "X25519" }, false, []);
  const agreed = async (own, theirs) =>
    new Uint8Array(await crypto.subtle.deriveBits({ name: "X25519", public: await importPublic(theirs) }, own, 256));
  const messageKey = async (shared, enc, recipient, info) => {
    const extracted = await labeledExtract(KEM, NONE, "eae_prk", shared);
    const secretShared = await labeledExpand(KEM, extracted, "shared_secret", join(enc, recipient), 32);
    const context = join(
      Uint8Array.of(0), await labeledExtract(SUITE, NONE, "psk_id_hash", NONE), await labeledExtract(SUITE, NONE, "info_hash", info));
    const secret = await labeledExtract(SUITE, secretShared, "secret", NONE);
    const key = await labeledExpand(SUITE, secret, "key", context, 32);
    const iv = await labeledExpand(SUITE, secret, "base_nonce", context, 12);
    return [await crypto.subtle.importKey("raw", key, "AES-GCM", false, ["encrypt", "decrypt"]), iv];
  };
  const unwrap = async (key, wrap, info) => {
    const enc = wrap.subarray(0, 32);
    const [by, iv] = await messageKey(await agreed(key.open, enc), enc, key.sealKey, info);
    return new Uint8Array(await crypto.subtle.decrypt({ name: "AES-GCM", iv }, by, wrap.subarray(32)));
  };
  const wrapTo = async (sealKey, dek, info) => {
    const passing = await crypto.subtle.generateKey({ name: "X25519" }, true, ["deriveBits"]);
    const enc = new Uint8Array(await crypto.subtle.exportKey("raw", passing.publicKey));
    const [by, iv] = await messageKey(await agreed(passing.privateKey, sealKey), enc, sealKey, info);
    return join(enc, new Uint8Array(await crypto.subtle.encrypt({ name: "AES-GCM", iv }, by, dek)));
  };

  // --- envelopes

  const bound = (caseId, version, keyId) =>
    text.encode(canonical({ "relay.envelope": 1, case_id: caseId, version, key_id: keyId }));
  const dekOf = async (key, envelope, caseId, version) => {
    if (!envelope || envelope.v !== 1) throw new Refused("This is not an envelope of a version known here.");
    if (envelope.case_id !== caseId || envelope.version !== version) {
      throw new Refused("This envelope is that of another case or version. Load the case again, and tell your operator.");
    }
    const wrap = envelope.wraps && Object.hasOwn(envelope.wraps, key.keyId) ? envelope.wraps[key.keyId] : null;
    if (wrap === null) throw new Refused("This envelope is not sealed to your key. Another moderator can open it, and rewrap it for you.");
    try {
      return await unwrap(key, fromBase64(wrap), bound(caseId, version, key.keyId));
    } catch (_) {
      throw new Refused("The wrapped key was changed. Tell your operator, and try another key.");
    }
  };
  const bodyOf = async (dek, envelope) => {
    const by = await crypto.subtle.importKey("raw", dek, "AES-GCM", false, ["decrypt"]);
    const how = { name: "AES-GCM", iv: fromBase64(envelope.iv), additionalData: bound(envelope.case_id, envelope.version, null) };
    try {
      return new Uint8Array(await crypto.subtle.decrypt(how, by, fromBase64(envelope.body)));
    } catch (_) {
      throw new Refused("The sealed text was changed. Tell your operator.");
    }
  };
  /* The bytes in that case's envelope of that version. */
  const openEnvelope = async (key, envelope, caseId, version) => bodyOf(await dekOf(key, envelope, caseId, version), envelope);
  /* A text sealed to these keys: entries with `key_id` and `seal_key`, such as those of another relay's moderators. */
  const sealEnvelope = async (plaintext, caseId, version, keys) => {
    if (new Set(keys.map((one) => one.key_id)).size < MIN_KEYS) throw new Refused("There are fewer than two keys to seal to.");
    const dek = crypto.getRandomValues(new Uint8Array(32)), iv = crypto.getRandomValues(new Uint8Array(12));
    const by = await crypto.subtle.importKey("raw", dek, "AES-GCM", false, ["encrypt"]);
    const how = { name: "AES-GCM", iv, additionalData: bound(caseId, version, null) };
    const body = new Uint8Array(await crypto.subtle.encrypt(how, by, plaintext));
    const wraps = {};
    for (const one of keys) wraps[one.key_id] = toBase64(await wrapTo(fromBase64(one.seal_key), dek, bound(caseId, version, one.key_id)));
    return { v: 1, case_id: caseId, version, iv: toBase64(iv), body: toBase64(body), wraps };
  };
  /* Wraps for listed keys that the envelope lacks: {key_id: wrap}. `listed` are entries of a list that `followChain` returned. */
  const rewrapEnvelope = async (key, envelope, listed) => {
    const dek = await dekOf(key, envelope, envelope.case_id, envelope.version);
    await bodyOf(dek, envelope);
    const wraps = {};
    for (const one of listed) {
      const info = bound(envelope.case_id, envelope.version, one.key_id);
      wraps[one.key_id] = toBase64(await wrapTo(fromBase64(one.seal_key), dek, info));
    }
    return wraps;
  };
  /* The answer to a test envelope: shows that it was opened, and nothing of what was in it. */
  const answerTest = async (key, envelope) => {
    const nonce = await openEnvelope(key, envelope, envelope.case_id, envelope.version);
    return toBase64(await sha256(join(text.encode("relay moderator key test"), nonce)));
  };

  // --- the signed list of keys

  const signedBytes = (statement) => {
    const { signature, ...rest } = statement;
    return text.encode(canonical(rest));
  };
  const listDigest = async (statement) => toBase64(await sha256(signedBytes(statement)));
  const requireList = async (list) => {
    const whole = Number.isInteger(list?.seq) && Number.isInteger(list?.made_ts) && Array.isArray(list?.keys);
    if (!whole || list.v !== 1 || list.keys.length < MIN_KEYS || list.keys.length > MAX_LISTED) {
      throw new Refused("The relay's list of moderators' keys is damaged.");
    }
    const seen = new Set();
    for (const one of list.keys) {
      const sealKey = fromBase64(one.seal_key), signKey = fromBase64(one.sign_key);
      const sizes = sealKey.length === KEY_BYTES && signKey.length === KEY_BYTES;
      if (!sizes || one.key_id !== await keyIdOf(sealKey, signKey) || seen.has(one.key_id)) {
        throw new Refused("A key in the relay's list is not one.");
      }
      seen.add(one.key_id);
    }
  };
  const requireNext = async (before, after) => {
    const refuse = (why) => { throw new Refused(`The relay's list of keys does not hold: ${why}. Don't go on: ask your operator in person.`); };
    const signer = (before ?? after).keys.find((one) => one.key_id === after.signed_by);
    if (!signer) refuse("it is signed by no listed key");
    if (before === null) {
      if (after.seq !== 0 || after.prev !== "" || signer.kind !== "recovery") refuse("the first one is not signed by its recovery key");
      if (after.keys.some((one) => one.active_ts !== after.made_ts)) refuse("a key of the first one counts from another time");
    } else {
      const follows = after.server === before.server && after.seq === before.seq + 1 && after.prev === await listDigest(before);
      if (!follows || after.made_ts < before.made_ts) refuse("a version does not follow from the one before");
      if (signer.active_ts > after.made_ts) refuse("it is signed by a key that does not count yet");
      for (const one of after.keys) {
        const was = before.keys.find((other) => other.key_id === one.key_id);
        if (was && canonical(was) !== canonical(one)) refuse("a listed key was changed");
        if (!was && one.active_ts < after.made_ts + DAY) refuse("a new key counts too early");
      }
      if (!after.keys.some((one) => one.kind === "recovery")) refuse("there is no recovery key");
    }
    const verify = await crypto.subtle.importKey("raw", fromBase64(signer.sign_key), { name: "Ed25519" }, false, ["verify"]);
    const holds = await crypto.subtle.verify("Ed25519", verify, fromBase64(after.signature), signedBytes(after));
    if (!holds) refuse("its signature is wrong");
  };
  /* The newest list of a chain that begins at the first one, or at that with the digest `pinned`. Keep the digest of what
   * this returns (`listDigest`), and give it here the next time. */
  const followChain = async (pinned, chain) => {
    if (!Array.isArray(chain) || chain.length === 0) throw new Refused("The relay gave no list of keys.");
    for (const list of chain) await requireList(list);
    let from = 0;
    if (pinned) {
      const digests = await Promise.all(chain.map(listDigest));
      from = digests.indexOf(pinned);
      if (from < 0) {
        throw new Refused("The relay's list of keys does not follow from the one you saw last. Don't go on: ask your operator in person.");
      }
    } else {
      await requireNext(null, chain[0]);
    }
    for (let at = from + 1; at < chain.length; at++) await requireNext(chain[at - 1], chain[at]);
    return chain[chain.length - 1];
  };
  /* Those of a list to whom one may rewrap now. */
  const counting = (list, now) => list.keys.filter((one) => one.active_ts <= now);
  const signList = async (key, before, keys, now) => {
    const statement = {
      v: 1, server: before.server, seq: before.seq + 1, prev: await listDigest(before), made_ts: now, keys, signed_by: key.keyId,
    };
    const signature = await crypto.subtle.sign("Ed25519", key.sign, text.encode(canonical(statement)));
    return { ...statement, signature: toBase64(new Uint8Array(signature)) };
  };
  /* The next list with one key more (`publicLine` as `publicText` writes it), signed. It counts a day later. */
  const addToList = async (key, before, userId, kind, publicLine, now) => {
    const added = { ...await readPublic(publicLine), user_id: userId, kind, active_ts: now + DAY };
    return signList(key, before, [...before.keys, added], now);
  };
  const removeFromList = (key, before, keyId, now) => signList(key, before, before.keys.filter((one) => one.key_id !== keyId), now);

  return {
    Refused, toBase64, fromBase64, requireBrowser, makeKey, keyOf, secretText, publicText, readPublic, readSecret, lockKey, unlockKey,
    openEnvelope, sealEnvelope, rewrapEnvelope, answerTest, followChain, listDigest, counting, addToList, removeFromList,
  };
})();
