/* Checks again, on a moderator's own machine, what an opened envelope says: V3, V4 and V6 to V10 of docs/reports.md, over the
 * event and the one value in it. Whoever sealed it may have lied. Nothing here speaks to the network or touches the page. */
"use strict";

const relayVerify = (() => {
  const ALGORITHM = "m.megolm.v1.aes-sha2", RIM = 72, MAC = 8, SIGNATURE = 64;
  const TOP = ["event_id", "type", "room_id", "sender", "state_key", "content", "hashes", "signatures", "depth", "prev_events", "auth_events", "origin_server_ts"];
  const OLD_TOP = ["prev_state", "origin", "membership"], OLD_VERSIONS = 10;
  const utf8 = new TextEncoder();

  class Fails extends Error {}
  const need = (holds, step) => { if (!holds) throw new Fails(step); };
  const join = (...parts) => {
    const made = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) { made.set(part, at); at += part.length; }
    return made;
  };
  const same = (a, b) => a.length === b.length && a.every((byte, at) => byte === b[at]);
  /* Keys in the order of their code points, as canonical JSON wants it; JavaScript alone sorts by UTF-16. */
  const byCodePoint = (a, b) => {
    const one = [...a], other = [...b];
    for (let at = 0; at < one.length && at < other.length; at++) {
      const differs = one[at].codePointAt(0) - other[at].codePointAt(0);
      if (differs) return differs;
    }
    return one.length - other.length;
  };
  const canonical = (value) => {
    if (Array.isArray(value)) return "[" + value.map(canonical).join(",") + "]";
    if (value !== null && typeof value === "object") {
      return "{" + Object.keys(value).sort(byCodePoint).map((key) => JSON.stringify(key) + ":" + canonical(value[key])).join(",") + "}";
    }
    return JSON.stringify(value);
  };
  const without = (value, ...names) => Object.fromEntries(Object.entries(value).filter(([name]) => !names.includes(name)));
  const sha256 = async (bytes) => new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const hmac = async (key, message) => {
    const imported = await crypto.subtle.importKey("raw", key, { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
    return new Uint8Array(await crypto.subtle.sign("HMAC", imported, message));
  };

  const varint = (raw, at) => {
    let value = 0n;
    for (let shift = 0n; shift < 70n; shift += 7n) {
      need(at < raw.length, "V6");
      const byte = raw[at++];
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return [value, at];
    }
    throw new Fails("V6");
  };
  const written = (value) => {
    const made = [];
    do { made.push(Number(value & 127n) | (value > 127n ? 128 : 0)); value >>= 7n; } while (value);
    return Uint8Array.from(made);
  };
  /* As the clients' library reads it, however it was written. */
  const parse = (whole) => {
    need(whole.length > RIM && whole[0] === 3, "V6");
    const payload = whole.subarray(0, whole.length - RIM);
    let at = 1, index = 0n, ciphertext = null;
    while (at < payload.length) {
      let tag, value;
      [tag, at] = varint(payload, at);
      const kind = tag & 7n;
      if (kind === 0n || kind === 2n) {
        [value, at] = varint(payload, at);
        if (tag === 8n) index = value & 0xffffffffn;
        if (kind === 2n) {
          const end = at + Number(value);
          need(end <= payload.length, "V6");
          if (tag === 18n) ciphertext = payload.subarray(at, end);
          at = end;
        }
      } else {
        need(kind === 1n || kind === 5n, "V6");
        at += kind === 1n ? 8 : 4;
      }
    }
    need(ciphertext !== null, "V6");
    const form = join(Uint8Array.of(3, 8), written(index), Uint8Array.of(18), written(BigInt(ciphertext.length)), ciphertext);
    return { index: Number(index), ciphertext, payloads: [payload, form], mac: whole.subarray(-RIM, -SIGNATURE), signature: whole.subarray(-SIGNATURE) };
  };

  /* A key that stands twice anywhere in a text that JSON.parse takes. */
  const hasDoubledKey = (json) => {
    const open = [];
    for (const token of json.match(/"(?:[^"\\]|\\.)*"(?:\s*:)?|[{}[\]]/gs) ?? []) {
      if (token === "{" || token === "[") open.push(new Set());
      else if (token === "}" || token === "]") open.pop();
      else if (token.endsWith(":")) {
        const name = JSON.parse(token.replace(/\s*:$/, "")), keys = open[open.length - 1];
        if (keys.has(name)) return true;
        keys.add(name);
      }
    }
    return false;
  };

  const check = async (item) => {
    const { pdu, room_version: version } = item, { fromBase64, toBase64 } = relayKeys;
    need(pdu && typeof pdu === "object" && pdu.content && pdu.hashes && /^[0-9]+$/.test(version), "V3");
    const hashed = await sha256(utf8.encode(canonical(without(pdu, "hashes", "signatures", "unsigned"))));
    need(same(hashed, fromBase64(pdu.hashes.sha256)), "V3");
    need(pdu.type === "m.room.encrypted" && !("state_key" in pdu), "V2");
    const kept = Number(version) <= OLD_VERSIONS ? [...TOP, ...OLD_TOP] : TOP;
    const covered = Object.fromEntries(Object.entries(pdu).filter(([name]) => kept.includes(name) && name !== "signatures"));
    const digest = toBase64(await sha256(utf8.encode(canonical({ ...covered, content: {} }))));
    const id = "$" + (version === "3" ? digest : digest.replace(/\+/g, "-").replace(/\//g, "_"));
    need(id === item.event_id && pdu.sender === item.sender && pdu.room_id === item.room_id, "V4");

    const { algorithm, session_id: sessionId, ciphertext } = pdu.content;
    need(algorithm === ALGORITHM && /^[A-Za-z0-9+/]{43}$/.test(sessionId) && typeof ciphertext === "string", "V6");
    const message = parse(fromBase64(ciphertext));
    need(message.index === item.index, "V6");
    const prk = fromBase64(item.prk);
    need(prk.length === 32, "V8");
    let keys = new Uint8Array(0), last = keys;
    for (let number = 1; number <= 3; number++) {
      last = await hmac(prk, join(last, utf8.encode("MEGOLM_KEYS"), Uint8Array.of(number)));
      keys = join(keys, last);
    }
    const verifier = await crypto.subtle.importKey("raw", fromBase64(sessionId), { name: "Ed25519" }, false, ["verify"]);
    let both = false, signed = false;
    for (const payload of message.payloads) {
      const signature = await crypto.subtle.verify("Ed25519", verifier, message.signature, join(payload, message.mac));
      const mac = same((await hmac(keys.subarray(32, 64), payload)).subarray(0, MAC), message.mac);
      signed ||= signature;
      both ||= signature && mac;
    }
    need(both, signed ? "V8" : "V7");
    const aes = await crypto.subtle.importKey("raw", keys.subarray(0, 32), "AES-CBC", false, ["decrypt"]);
    let plain;
    try {
      plain = new Uint8Array(await crypto.subtle.decrypt({ name: "AES-CBC", iv: keys.subarray(64, 80) }, aes, message.ciphertext));
    } catch (_) {
      throw new Fails("V9");
    }
    need(item.plaintext === toBase64(plain), "V9");
    let inner;
    const json = new TextDecoder().decode(plain);
    try { inner = JSON.parse(json); } catch (_) { throw new Fails("V10"); }
    need(inner && typeof inner.type === "string" && inner.content && typeof inner.content === "object", "V10");
    need(inner.room_id === pdu.room_id && !hasDoubledKey(json), "V10");
  };

  /* The step that does not hold, or null. The server's signature (V5) is for the relay to judge. */
  const item = async (opened) => {
    try {
      await check(opened);
      return null;
    } catch (error) {
      return error instanceof Fails ? error.message : "V6";
    }
  };
  return { item };
})();
