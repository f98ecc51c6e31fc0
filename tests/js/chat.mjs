// A small web client on matrix-js-sdk with its Rust crypto, as a page: sign in, begin a conversation, talk encrypted. Keys lie
// in the browser's own database, so a reload goes on where it was. With ?sliding in the address it uses sliding sync.
// Bundled by esbuild and driven by test_in_a_browser.py.
import * as sdk from "matrix-js-sdk";
import { SlidingSync } from "matrix-js-sdk/lib/sliding-sync.js";

const KEPT = "chat.session";
const sliding = location.search.includes("sliding");
const at = (id) => document.getElementById(id);
let client = null;
let shown = null;

const silent = { trace() {}, debug() {}, info() {}, warn() {}, error() {}, getChild: () => silent };

function trouble(error) {
    at("trouble").textContent = String(error?.message ?? error);
}

function doing(form, what) {
    at(form).addEventListener("submit", (event) => {
        event.preventDefault();
        const given = Object.fromEntries(new FormData(event.target));
        what(given, event.target).catch(trouble);
    });
}

async function begins(session) {
    client = sdk.createClient({ ...session, logger: silent, timelineSupport: true });
    client.on(sdk.ClientEvent.Room, draw);
    client.on(sdk.RoomEvent.MyMembership, draw);
    client.on(sdk.RoomEvent.Timeline, draw);
    client.on(sdk.RoomStateEvent.Events, draw);
    client.on(sdk.RoomEvent.LocalEchoUpdated, draw);
    client.on(sdk.MatrixEventEvent.Decrypted, draw);
    client.on(sdk.RoomMemberEvent.Typing, draw);
    await client.initRustCrypto();
    const options = { initialSyncLimit: 20, pollTimeout: 10_000 };
    if (sliding) {
        const all = { ranges: [[0, 19]], required_state: [["*", "*"]], timeline_limit: 20 };
        const one = { required_state: [["*", "*"]], timeline_limit: 20 };
        options.slidingSync = new SlidingSync(session.baseUrl, new Map([["all", all]]), one, client, 10_000);
    }
    await client.startClient(options);
    at("sign-in").hidden = true;
    document.querySelector("main").hidden = false;
    at("who").textContent = `${session.userId} · ${session.deviceId}`;
    draw();
}

doing("sign-in", async ({ server, name, password }) => {
    const asking = sdk.createClient({ baseUrl: server, logger: silent });
    const identifier = { type: "m.id.user", user: name };
    const answer = await asking.loginRequest({ type: "m.login.password", identifier, password, initial_device_display_name: "browser" });
    const session = { baseUrl: server, userId: answer.user_id, deviceId: answer.device_id, accessToken: answer.access_token };
    localStorage.setItem(KEPT, JSON.stringify(session));
    await begins(session);
});

doing("begin", async ({ to }, form) => {
    const { room_id } = await client.createRoom({ preset: "private_chat", invite: [to], is_direct: true });
    shown = room_id;
    form.reset();
    draw();
});

doing("say", async ({ text }, form) => {
    form.reset();
    await client.sendTyping(shown, false, 0);
    await client.sendTextMessage(shown, text);
});

at("say").elements.text.addEventListener("input", () => client.sendTyping(shown, true, 10_000).catch(trouble));

function draw() {
    const rooms = client?.getRooms() ?? [];
    at("rooms").replaceChildren(
        ...rooms.map((room) => {
            const button = document.createElement("button");
            const invited = room.getMyMembership() === "invite";
            button.textContent = invited ? `Join ${room.name}` : room.name;
            button.onclick = async () => {
                if (invited) await client.joinRoom(room.roomId).catch(trouble);
                shown = room.roomId;
                draw();
            };
            return button;
        }),
    );
    const room = shown && client.getRoom(shown);
    if (!room) return;
    at("title").textContent = room.name;
    at("sealed").textContent = room.hasEncryptionStateEvent() ? "encrypted" : "NOT ENCRYPTED";
    // With sliding sync the SDK leaves it to the page to decrypt what it shows.
    for (const event of room.getLiveTimeline().getEvents()) {
        if (event.isEncrypted() && !event.isBeingDecrypted() && !event.getClearContent()) client.decryptEventIfNeeded(event);
    }
    at("messages").replaceChildren(...room.getLiveTimeline().getEvents().filter(isSaid).map(line));
    const typing = room.getMembers().filter((member) => member.typing && member.userId !== client.getUserId());
    at("typing").textContent = typing.length ? `${typing.map((member) => member.name).join(", ")} is typing …` : "";
}

const isSaid = (event) => event.getType() === "m.room.message" || event.isDecryptionFailure();

function line(event) {
    const item = document.createElement("li");
    const who = document.createElement("b");
    who.textContent = event.sender?.name ?? event.getSender();
    item.append(who, event.isDecryptionFailure() ? "(unreadable)" : event.getContent().body);
    if (event.status) item.dataset.status = event.status;
    return item;
}

window.addEventListener("unhandledrejection", (event) => trouble(event.reason));
const kept = localStorage.getItem(KEPT);
if (kept) begins(JSON.parse(kept)).catch(trouble);
