// A full life of matrix-js-sdk with its Rust crypto, on two relays: alice's seals strictly what it may, bob's allows
// reactions. One JSON line per step on stdout: {"step", "ok", "ms", "error"?}. Ends at the first step that fails.
// Usage: node life.mjs URL_OF_ALICES_RELAY URL_OF_BOBS_RELAY. Run by test_js_sdk.py, which copies it beside node_modules.
import { webcrypto, createCipheriv, createDecipheriv, createHash, randomBytes } from "node:crypto";

globalThis.crypto ??= webcrypto;
for (const name of ["log", "info", "debug", "warn", "trace", "error"]) console[name] = () => {};
const sdk = await import("matrix-js-sdk");
const { CryptoEvent, VerificationPhase, VerifierEvent, decodeRecoveryKey } = await import("matrix-js-sdk/lib/crypto-api/index.js");

const [ONE, TWO] = process.argv.slice(2);
const PASSWORD = "correct horse battery staple";
const WITHIN_MS = 40_000;
const MESSAGES = 100;
const silent = { trace() {}, debug() {}, info() {}, warn() {}, error() {}, getChild: () => silent };
const clients = [];

function must(condition, sentence) {
    if (!condition) throw new Error(sentence);
}

async function until(question, sentence) {
    const deadline = Date.now() + WITHIN_MS;
    while (Date.now() < deadline) {
        const answer = await question();
        if (answer) return answer;
        await new Promise((resolve) => setTimeout(resolve, 25));
    }
    throw new Error(`never came: ${sentence}`);
}

async function refused(promise, sentence) {
    try {
        await promise;
    } catch (error) {
        return error;
    }
    throw new Error(`was not refused: ${sentence}`);
}

async function step(name, what) {
    const began = Date.now();
    const tell = (rest) => process.stdout.write(`${JSON.stringify({ step: name, ms: Date.now() - began, ...rest })}\n`);
    try {
        await what();
        tell({ ok: true });
    } catch (error) {
        tell({ ok: false, error: `${error?.errcode ?? ""} ${error?.stack ?? error}`.trim() });
        leave(1);
    }
}

// The output is a pipe: wait until it was taken.
function leave(status) {
    for (const client of clients) client.stopClient();
    process.stdout.write("", () => process.exit(status));
}

// ---- People and devices

async function startsDevice(url, answer, secrets) {
    const client = sdk.createClient({
        baseUrl: url,
        userId: answer.user_id,
        deviceId: answer.device_id,
        accessToken: answer.access_token,
        logger: silent,
        timelineSupport: true,
        verificationMethods: ["m.sas.v1"],
        cryptoCallbacks: {
            getSecretStorageKey: async ({ keys }) => {
                const id = Object.keys(keys).find((one) => secrets.keys.has(one)) ?? Object.keys(keys)[0];
                return secrets.keys.has(id) ? [id, secrets.keys.get(id)] : secrets.latest && [id, secrets.latest];
            },
            cacheSecretStorageKey: (id, _info, key) => secrets.keys.set(id, key),
        },
    });
    clients.push(client);
    client.secrets = secrets;
    client.verifications = [];
    client.on(CryptoEvent.VerificationRequestReceived, (request) => client.verifications.push(request));
    await client.initRustCrypto({ useIndexedDB: false });
    await client.startClient({ initialSyncLimit: 30, pollTimeout: 10_000, pendingEventOrdering: "detached" });
    await until(() => client.isInitialSyncComplete(), "the first sync");
    return client;
}

async function registers(url, name) {
    const client = sdk.createClient({ baseUrl: url, logger: silent });
    const request = { username: name, password: PASSWORD, initial_device_display_name: "laptop" };
    const asked = await refused(client.registerRequest(request), "a registration without authentication");
    must(asked.httpStatus === 401 && asked.data.session, `the relay names the stages of registration: ${asked}`);
    const stage = asked.data.flows[0].stages[0];
    return client.registerRequest({ ...request, auth: { type: stage, session: asked.data.session } });
}

async function signsIn(url, name) {
    const client = sdk.createClient({ baseUrl: url, logger: silent });
    return client.loginRequest({
        type: "m.login.password",
        identifier: { type: "m.id.user", user: name },
        password: PASSWORD,
        initial_device_display_name: "phone",
    });
}

const withPassword = (client) => (makeRequest) =>
    makeRequest(null).catch((error) => {
        if (error.httpStatus !== 401 || !error.data?.session) throw error;
        return makeRequest({
            type: "m.login.password",
            identifier: { type: "m.id.user", user: client.getUserId() },
            password: PASSWORD,
            session: error.data.session,
        });
    });

function heard(client, room) {
    return (client.getRoom(room)?.getLiveTimeline().getEvents() ?? []).filter((one) => one.getType() === "m.room.message");
}

const hears = (client, room, body) =>
    until(() => heard(client, room).find((one) => one.getContent().body === body && !one.isRedacted()), `"${body}"`);

const says = (client, room, body) => client.sendEvent(room, "m.room.message", { msgtype: "m.text", body });

// ---- The life

let alice, bob, phone, room, first, recovery;
const spoken = [];

await step("register", async () => {
    alice = await startsDevice(ONE, await registers(ONE, "alice"), { keys: new Map() });
    bob = await startsDevice(TWO, await registers(TWO, "bob"), { keys: new Map() });
});

await step("cross-signing", async () => {
    for (const client of [alice, bob]) {
        await client.getCrypto().bootstrapCrossSigning({ authUploadDeviceSigningKeys: withPassword(client) });
        await until(() => client.getCrypto().isCrossSigningReady(), "cross-signing is ready");
        // A question that was on its way at that moment is answered as it was before; the relay says that it has changed, and the
        // client asks again.
        const status = () => client.getCrypto().getDeviceVerificationStatus(client.getUserId(), client.getDeviceId());
        await until(async () => (await status())?.signedByOwner, "the device is signed by its owner");
    }
});

await step("secret storage and key backup", async () => {
    const crypto = alice.getCrypto();
    await crypto.bootstrapSecretStorage({
        createSecretStorageKey: async () => (recovery = await crypto.createRecoveryKeyFromPassphrase()),
        setupNewSecretStorage: true,
        setupNewKeyBackup: true,
    });
    await until(() => crypto.isSecretStorageReady(), "secret storage is ready");
    await until(() => crypto.getActiveSessionBackupVersion(), "the backup is on");
});

await step("encrypted room between two relays", async () => {
    const made = await alice.createRoom({
        preset: "private_chat",
        invite: [bob.getUserId()],
        initial_state: [{ type: "m.room.encryption", state_key: "", content: { algorithm: "m.megolm.v1.aes-sha2" } }],
    });
    room = made.room_id;
    await until(() => bob.getRoom(room)?.getMyMembership() === "invite", "the invitation");
    await bob.joinRoom(room);
    await until(() => alice.getRoom(room)?.getMember(bob.getUserId())?.membership === "join", "bob's joining");
    await until(() => bob.getRoom(room)?.getMyMembership() === "join", "bob sees the room");
    await until(() => alice.getCrypto().isEncryptionEnabledInRoom(room), "alice's client encrypts");
    await until(() => bob.getCrypto().isEncryptionEnabledInRoom(room), "bob's client encrypts");
});

await step("100 messages in order", async () => {
    for (let number = 0; number < MESSAGES; number++) {
        const body = `message ${number}`;
        spoken.push(body);
        const sent = await says(alice, room, body);
        first ??= sent.event_id;
    }
    await hears(bob, room, spoken.at(-1));
    const bodies = () => heard(bob, room).map((one) => one.getContent().body).filter((body) => spoken.includes(body));
    await until(() => bodies().length >= MESSAGES, `all of them (${bodies().length})`).catch((error) => {
        throw new Error(`${error.message}; heard ${bodies().length}, e.g. ${bodies().slice(0, 5)}`);
    });
    must(JSON.stringify(bodies()) === JSON.stringify(spoken), "bob reads all of them, in order, each once");
    await says(bob, room, "I read them all");
    await hears(alice, room, "I read them all");
});

await step("encrypted attachment", async () => {
    const picture = Buffer.concat([Buffer.from("89504e470d0a1a0a", "hex"), randomBytes(150_000)]);
    // Not a picture: a small one may yet become somebody's avatar and is held in memory until then.
    const readable = Buffer.concat([Buffer.from("%PDF-1.7\n"), randomBytes(5_000)]);
    const clear = await refused(alice.uploadContent(readable, { type: "application/pdf", includeFilename: false }), "a readable document");
    must(clear.errcode === "M_FORBIDDEN" && clear.data.error.length > 30, `the refusal says why: ${clear}`);
    const key = randomBytes(32);
    const iv = Buffer.concat([randomBytes(8), Buffer.alloc(8)]);
    const cipher = createCipheriv("aes-256-ctr", key, iv);
    const sealed = Buffer.concat([cipher.update(picture), cipher.final()]);
    const sha256 = createHash("sha256").update(sealed).digest("base64").replace(/=+$/, "");
    const { content_uri: url } = await alice.uploadContent(sealed, { type: "application/octet-stream", includeFilename: false });
    const file = { url, v: "v2", iv: iv.toString("base64"), hashes: { sha256 } };
    file.key = { kty: "oct", alg: "A256CTR", ext: true, key_ops: ["encrypt", "decrypt"], k: key.toString("base64url") };
    await alice.sendEvent(room, "m.room.message", { msgtype: "m.image", body: "picture.png", file });
    const got = (await hears(bob, room, "picture.png")).getContent().file;
    const address = bob.mxcUrlToHttp(got.url, undefined, undefined, undefined, false, true, true);
    const answer = await fetch(address, { headers: { Authorization: `Bearer ${bob.getAccessToken()}` } });
    must(answer.ok, `bob's relay brings the file: ${answer.status}`);
    const decipher = createDecipheriv("aes-256-ctr", Buffer.from(got.key.k, "base64url"), Buffer.from(got.iv, "base64"));
    must(decipher.update(Buffer.from(await answer.arrayBuffer())).equals(picture), "the picture came whole");
});

await step("edit", async () => {
    const { event_id } = await says(alice, room, "a tpyo");
    const original = await hears(bob, room, "a tpyo");
    await alice.sendEvent(room, "m.room.message", {
        "msgtype": "m.text",
        "body": "* a typo",
        "m.new_content": { msgtype: "m.text", body: "a typo" },
        "m.relates_to": { rel_type: "m.replace", event_id },
    });
    await until(() => original.getContent().body === "a typo", "the edit shows at bob's");
});

const reaction = () => ({ "m.relates_to": { rel_type: "m.annotation", event_id: first, key: "👍" } });

await step("reaction refused under the seal", async () => {
    const error = await refused(alice.sendEvent(room, "m.reaction", reaction()), "a reaction in clear");
    must(error.errcode === "M_FORBIDDEN" && error.httpStatus === 403, `it is refused as forbidden: ${error}`);
    must(/reaction/i.test(error.data.error), `the refusal speaks of reactions: ${error.data.error}`);
    // As a client does when its owner puts the failed event away: until then it sends nothing more.
    for (const one of alice.getRoom(room).getPendingEvents()) alice.cancelPendingEvent(one);
});

await step("reaction where privacy.allow lists it", async () => {
    const { event_id } = await bob.sendEvent(room, "m.reaction", reaction());
    const found = await until(() => bob.getRoom(room).findEventById(event_id), "bob sees his reaction");
    must(found.getContent()["m.relates_to"].key === "👍", "it kept its emoji");
});

await step("redaction", async () => {
    const { event_id } = await says(alice, room, "to be taken back");
    const seen = await hears(bob, room, "to be taken back");
    await alice.redactEvent(room, event_id);
    await until(() => seen.isRedacted(), "bob sees that it was taken back");
    const left = await bob.fetchRoomEvent(room, event_id);
    must(!left.content.ciphertext, "the relay no longer has the ciphertext");
});

await step("second device, verified by emoji", async () => {
    phone = await startsDevice(ONE, await signsIn(ONE, "alice"), { keys: new Map(), latest: null });
    await until(
        async () => (await alice.getCrypto().getUserDeviceInfo([alice.getUserId()])).get(alice.getUserId())?.has(phone.getDeviceId()),
        "alice's laptop knows of the phone",
    );
    await until(() => phone.getCrypto().userHasCrossSigningKeys(), "the phone knows its owner's keys");
    const asked = await phone.getCrypto().requestOwnUserVerification();
    const coming = await until(() => alice.verifications.find((one) => one.isSelfVerification), "the request at the laptop");
    await coming.accept();
    await until(() => asked.phase === VerificationPhase.Ready, "the phone learns that it was accepted");
    const ours = await asked.startVerification("m.sas.v1");
    const theirs = await until(() => coming.verifier, "the laptop's side");
    const shown = [ours, theirs].map((one) => new Promise((resolve) => {
        const already = one.getShowSasCallbacks();
        if (already) resolve(already);
        else one.once(VerifierEvent.ShowSas, resolve);
    }));
    const done = [ours.verify(), theirs.verify()];
    for (const one of done) one.catch(() => {});
    const [a, b] = await until(() => Promise.race([Promise.all(shown), new Promise((r) => setTimeout(r, 3000))]), "the emoji");
    must(JSON.stringify(a.sas.emoji) === JSON.stringify(b.sas.emoji), "both devices show the same emoji");
    await Promise.all([a.confirm(), b.confirm()]);
    await Promise.all(done);
    const status = () => alice.getCrypto().getDeviceVerificationStatus(alice.getUserId(), phone.getDeviceId());
    await until(async () => (await status())?.crossSigningVerified, "the phone is trusted by cross-signing");
    await until(() => phone.getCrypto().isCrossSigningReady(), "the phone has the keys of cross-signing");
});

await step("second device restores history from backup", async () => {
    // The client remembers what the server said of the backup once; how many keys lie there now only the server knows.
    const saved = () => alice.http.authedRequest("GET", "/room_keys/version", undefined, undefined, { prefix: "/_matrix/client/v3" });
    await until(async () => (await saved()).count >= 2, "the laptop has saved the keys of both");
    phone.secrets.latest = recovery.privateKey;
    await phone.getCrypto().loadSessionBackupPrivateKeyFromSecretStorage();
    await phone.getCrypto().checkKeyBackupAndEnable();
    const { imported, total } = await phone.getCrypto().restoreKeyBackup();
    must(imported === total && total >= 2, `every key was brought back: ${imported} of ${total}`);
    const timeline = phone.getRoom(room).getLiveTimeline();
    for (let page = 0; page < 10; page++) {
        if (!(await phone.paginateEventTimeline(timeline, { backwards: true, limit: 100 }))) break;
    }
    const bodies = () => heard(phone, room).map((one) => one.getContent().body).filter((body) => spoken.includes(body));
    await until(async () => {
        await phone.getRoom(room).decryptAllEvents();
        return bodies().length >= MESSAGES;
    }, "the whole history on the phone");
    must(JSON.stringify(bodies()) === JSON.stringify(spoken), "the phone reads all of them, in order");
});

await step("both devices hear what is said next", async () => {
    await says(bob, room, "hello to both");
    await hears(alice, room, "hello to both");
    await hears(phone, room, "hello to both");
});

await step("device removed", async () => {
    const remove = (auth) => alice.deleteDevice(phone.getDeviceId(), auth ?? undefined);
    await withPassword(alice)(remove);
    const error = await refused(phone.whoami(), "a request of the removed device");
    must(error.errcode === "M_UNKNOWN_TOKEN", `its token is unknown: ${error}`);
    phone.stopClient();
    const gone = async () => !(await bob.getCrypto().getUserDeviceInfo([alice.getUserId()], true)).get(alice.getUserId())?.has(phone.getDeviceId());
    await until(gone, "bob's client no longer knows the phone");
});

await step("kick", async () => {
    await alice.kick(room, bob.getUserId(), "a private remark");
    await until(() => bob.getRoom(room).getMyMembership() === "leave", "bob learns it");
    const error = await refused(bob.sendTyping(room, true, 1000), "typing after the kick");
    must(error.errcode === "M_FORBIDDEN", `it is forbidden: ${error}`);
});

await step("logout", async () => {
    for (const client of [alice, bob]) {
        await client.logout(true);
        const error = await refused(client.whoami(), "a request after the logout");
        must(error.errcode === "M_UNKNOWN_TOKEN", `the token is gone: ${error}`);
    }
});

leave(0);
