// What Draupnir does with its SDK: a policy list, a protected room, its management room, reports, the admin operations.
// Run by test_draupnir.py: node commands.cjs URL TOKEN, then one JSON line on standard input for what the test prepared.
// Each step is a JSON line on standard output.
"use strict";
const Module = require("node:module");

// The SDK loads its native crypto at once; a bot without encryption never uses it, and it is not in the registry.
const load = Module._load;
Module._load = function (name, ...rest) {
  if (name !== "@matrix-org/matrix-sdk-crypto-nodejs") return load.call(this, name, ...rest);
  return new Proxy({}, { get: (_, key) => (key === "__esModule" ? false : class {}) });
};
const { LogService, MatrixClient, MemoryStorageProvider } = require("@vector-im/matrix-bot-sdk");
LogService.setLogger({ info() {}, warn() {}, error() {}, debug() {}, trace() {} });

const [url, token] = process.argv.slice(2);
const client = new MatrixClient(url, token, new MemoryStorageProvider());
const admin = (method, path, query, body) => client.doRequest(method, `/_synapse/admin/${path}`, query, body);
const e = encodeURIComponent;

function must(holds, what) {
  if (!holds) throw new Error(what);
}

async function refused(doing) {
  try {
    await doing;
  } catch (error) {
    return error;
  }
  throw new Error("this should have been refused");
}

async function until(what, holds, seconds = 15) {
  const deadline = Date.now() + seconds * 1000;
  for (;;) {
    const got = await holds();
    if (got) return got;
    must(Date.now() < deadline, `waited in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

const said = [];
client.on("room.message", (room, event) => said.push({ room, event }));
client.on("room.event", (room, event) => said.push({ room, event }));

const steps = (given) => [
  ["sign in and listen", async () => {
    must((await client.getUserId()) === given.bot, "who am I");
    await client.start();
  }],
  ["management room", async () => {
    await client.joinRoom(given.management);
    await client.sendNotice(given.management, "Draupnir is there.");
    const heard = await until("a command of the moderator", () => said.find(({ event }) => event.content?.body === "!draupnir status"));
    must(heard.room === given.management, "the command comes in the management room");
    const setting = { notificationRoomID: given.management };
    await client.sendStateEvent(given.management, "org.matrix.mjolnir.setting", "PolicyChangeNotification", setting);
    const kept = await client.getRoomStateEvent(given.management, "org.matrix.mjolnir.setting", "PolicyChangeNotification");
    must(kept.notificationRoomID === given.management, "a protection's settings are kept there");
    await refused(client.sendStateEvent(given.management, "org.example.other", "", { words: "x" }));
  }],
  ["policy list", async () => {
    given.list = await client.createRoom({
      preset: "public_chat", name: "a list", room_alias_name: "bans",
      creation_content: { type: "support.feline.policy.lists.msc.v1" },
      initial_state: [{ type: "org.matrix.mjolnir.shortcode", state_key: "", content: { shortcode: "bans" } }],
    });
    await client.setAccountData("org.matrix.mjolnir.watched_lists", { references: [given.list] });
    must((await client.getAccountData("org.matrix.mjolnir.watched_lists")).references[0] === given.list, "it is remembered");
    must((await client.resolveRoom(`#bans:${given.server}`)) === given.list, "the list has an address");
  }],
  ["protect a room", async () => {
    must((await admin("GET", `v1/users/${e(given.bot)}/admin`)).admin === true, "the bot is an administrator");
    await admin("POST", `v1/rooms/${e(given.room)}/make_room_admin`, null, { user_id: given.bot });
    await client.joinRoom(given.room);
    must((await client.getJoinedRooms()).includes(given.room), "it is there");
    const levels = await client.getRoomStateEvent(given.room, "m.room.power_levels", "");
    must(levels.users[given.bot] === 100, "with the power to protect it");
    await client.sendStateEvent(given.room, "m.room.server_acl", "", { allow: ["*"], deny: ["evil.example"], allow_ip_literals: false });
  }],
  ["ban by policy list", async () => {
    await client.sendStateEvent(given.list, "m.policy.rule.user", `rule:${given.mallory}`, {
      entity: given.mallory, recommendation: "m.ban", reason: "spam",
    });
    const rules = (await client.getRoomState(given.list)).filter((event) => event.type === "m.policy.rule.user");
    must(rules.length === 1 && rules[0].content.entity === given.mallory, "the rule stands in the list");
    await client.banUser(given.mallory, given.room, "spam");
    const members = await client.getRoomMembers(given.room, undefined, ["ban"]);
    must(members.some((member) => member.membershipFor === given.mallory), "whom the list names is banned");
    await client.redactEvent(given.room, given.message, "spam");
    must(Object.keys((await client.getEvent(given.room, given.message)).content).length === 0, "and her message is gone");
    await client.unbanUser(given.mallory, given.room);
  }],
  ["poll the reports", async () => {
    const answer = await until("a report", async () => {
      const got = await admin("GET", "v1/event_reports", { dir: "f" });
      return got.event_reports.length ? got : null;
    });
    must(answer.event_reports.length === 1 && answer.total === answer.event_reports[0].id, "what is secret is not in the list");
    const report = answer.event_reports[0];
    must(report.event_id === given.reported && report.sender === given.mallory, "the report names the event");
    must(report.user_id !== given.reporter && report.user_id.endsWith(`:${given.server}`), "and not who reported it");
    must(/^sealed: open case \d+ at the desk$/.test(report.reason), `its words stay sealed: ${report.reason}`);
    const context = await admin("GET", `v1/rooms/${e(report.room_id)}/context/${e(report.event_id)}`, { limit: 1 });
    must(context.event.type === "m.room.encrypted" && context.event.room_id === given.room, "its event can be had");
    await refused(admin("GET", `v1/rooms/${e(given.room)}/context/${e(given.secret)}`, { limit: 1 }));
    await client.sendNotice(given.management, `Report ${report.id}: ${report.reason}, reporter ${report.user_id}`);
    const next = await admin("GET", "v1/event_reports", { dir: "f", from: answer.next_token ?? answer.total });
    must(next.event_reports.length === 0, "and is not polled twice");
  }],
  ["suspend and shadow", async () => {
    await admin("PUT", `v1/suspend/${e(given.mallory)}`, null, { suspend: true });
    let details = await admin("GET", `v2/users/${e(given.mallory)}`);
    must(details.suspended === true && details.locked === false && details.name === given.mallory, "suspended");
    for (const key of ["is_guest", "admin", "deactivated", "erased", "shadow_banned"]) must(details[key] === false, key);
    must(Number.isInteger(details.creation_ts) && Number.isInteger(details.last_seen_ts) && details.user_type === null, "times");
    await admin("PUT", `v1/suspend/${e(given.mallory)}`, null, { suspend: false });
    await admin("POST", `v1/users/${e(given.mallory)}/shadow_ban`, null, {});
    details = await admin("GET", `v2/users/${e(given.mallory)}`);
    must(details.shadow_banned === true && details.suspended === false, "shadowed");
    await admin("DELETE", `v1/users/${e(given.mallory)}/shadow_ban`, null, {});
    must((await refused(admin("GET", `v2/users/${e(`@nobody:${given.server}`)}`))).statusCode === 404, "unknown people are 404");
  }],
  ["redact, deactivate and shut wait", async () => {
    const redact = await admin("POST", `v1/user/${e(given.mallory)}/redact`, null, { rooms: [] });
    const status = await admin("GET", `v1/user/redact_status/${e(redact.redact_id)}`);
    must(status.status === "scheduled", "what can't be undone waits");
    await admin("POST", `v1/deactivate/${e(given.mallory)}`, undefined, { erase: false });
    await admin("DELETE", `v2/rooms/${e(given.bad)}`, null, { block: true });
    await admin("DELETE", `v1/rooms/${e(given.bad)}`, null, { new_room_user_id: given.bot, block: true });
    must((await admin("GET", `v1/rooms/${e(given.bad)}/block`)).block === true, "the room is blocked at once, whatever waits");
  }],
  ["look at rooms", async () => {
    const rooms = await admin("GET", "v1/rooms", { limit: 2 });
    must(rooms.rooms.length === 2 && rooms.total_rooms > 2 && rooms.next_batch === 2, "in pages");
    const details = await admin("GET", `v1/rooms/${e(given.room)}`);
    must(details.encryption === "m.megolm.v1.aes-sha2" && details.joined_members === 3, "details");
    must((await refused(admin("GET", `v1/rooms/${e("!nowhere:x.example")}`))).statusCode === 404, "unknown rooms are 404");
  }],
];

async function main() {
  const given = JSON.parse(await new Promise((resolve) => process.stdin.once("data", resolve)));
  for (const [step, take] of steps(given)) {
    try {
      await take();
      console.log(JSON.stringify({ step, ok: true }));
    } catch (error) {
      const body = error?.body ? ` ${JSON.stringify(error.body)}` : "";
      console.log(JSON.stringify({ step, ok: false, error: `${error?.stack ?? error}${body}` }));
      process.exit(1);
    }
  }
  client.stop();
  process.exit(0);
}

main();
