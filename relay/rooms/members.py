"""Coming and going: join, leave, invite, kick, ban, knock, forget; in rooms of ours and, with `afar.py`, in others'.

Spec: client-server-api/#room-membership, rooms/v8/ (restricted joins). The seal: a room without encryption is not joined
(spaces, policy rooms, ban lists that are followed and `privacy.clear_rooms` aside); inviting is free. Reasons are free text: the seal leaves them out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from relay.db import ChainBroken, Database, Tx
from relay.doors import Doors
from relay.errors import ApiError, Forbidden, NotFound
from relay.ids import server_of
from relay.protocol.event import Event
from relay.protocol.seal import Seal
from relay.rooms.afar import NOT_ENCRYPTED, Afar
from relay.rooms.append import Appender
from relay.rooms.create import UNENCRYPTED_TYPES, Profiles
from relay.rooms.receive import Receiver
from relay.rooms.room import CREATE, JOIN_RULES, Room
from relay.rooms.rooms import Rooms
from relay.rooms.send import MAX_TRIES, Sender
from relay.rooms.store import LOCAL, Stored

MAX_ALLOW_CONDITIONS = 50
MEMBER = "m.room.member"
IN_ROOMS = frozenset({"displayname", "avatar_url"})
# What the server says in a member event, whatever a client wrote there.
SERVERS_OWN = frozenset({"membership", "join_authorised_via_users_server", "third_party_invite", "third_party_signed"})


class Members:
    def __init__(
        self,
        db: Database,
        rooms: Rooms,
        appender: Appender,
        sender: Sender,
        seal: Seal,
        doors: Doors,
        profiles: Profiles,
        afar: Afar,
        receiver: Receiver,
        *,
        clear_rooms: Iterable[str] = (),
        local_user_exists: Callable[[str], Any],
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._sender = sender
        self._seal = seal
        self._doors = doors
        self._profiles = profiles
        self._afar = afar
        self._receiver = receiver
        self._clear_rooms = frozenset(clear_rooms)
        self._local_user_exists = local_user_exists
        # Rooms that may be joined though they are not encrypted, beside those of the seal; moderation sets it.
        self.also_admitted: Callable[[str], bool] = lambda room_id: False
        self._server_name = rooms.server_name
        # Asked before an invite is turned down; raises where that may not be. The server sets it.
        self.before_turning_down: Callable[[str, str], Awaitable[None]] | None = None

    # --- join

    async def join(
        self,
        user_id: str,
        room_id: str,
        *,
        via: Sequence[str] = (),
        content: Mapping[str, Any] | None = None,
        ts: int | None = None,
    ) -> None:
        """`ts` is an application service's time for it, here and below; other servers' rooms take none."""
        room = await self._rooms.get(room_id)
        if room is not None and room.members.get(user_id) == "join" and room.local_joined:
            return
        await self._doors.join(user_id, room_id)
        member = await self._own_member("join", user_id, content)
        # Whether she was banned may not be known yet: then the room's other servers say whether she may come.
        if room is not None and room.known and room.local_joined and room.partial is None:
            await self._require_encrypted(room)
            authoriser = await self._authoriser(room, user_id)
            if authoriser is None or server_of(authoriser) == self._server_name:
                if authoriser is not None:
                    member["join_authorised_via_users_server"] = authoriser
                await self._change(room_id, sender=user_id, target=user_id, content=member, ts=ts)
                return
            via = [*via, server_of(authoriser)]
        placed_elsewhere = await self._afar.join(
            user_id, room_id, await self._servers_for(room_id, user_id, via, room), member, self._may_be_joined
        )
        if placed_elsewhere is not None:
            server, event = placed_elsewhere
            # The server that took it passes it on to the others.
            await self._admitted(event, server, 0)

    async def _servers_for(self, room_id: str, user_id: str, via: Sequence[str], room: Room | None) -> list[str]:
        servers = list(
            dict.fromkeys(
                [
                    *via,
                    *await self._afar.inviters(room_id, user_id),
                    # Who names servers knows better than the room's ID, whose server may have left long ago.
                    *([server_of(room_id)] if server_of(room_id) and not via else []),
                ]
            )
        )
        # What we knew of a room when the last of us left it is worth less than what she says.
        if room is not None and (room.local_joined or not via):
            servers += [s for s in room.servers if s not in servers]
        return [s for s in servers if s != self._server_name]

    async def _require_encrypted(self, room: Room) -> None:
        create = await room.event(*CREATE)
        if not self._may_be_joined(
            room.room_id, room.encrypted, create.content.get("type") if create is not None else None
        ):
            raise Forbidden(NOT_ENCRYPTED)

    def _may_be_joined(self, room_id: str, encrypted: bool, room_type: object) -> bool:
        """Whether the seal lets local people into a room like this."""
        if self._seal.level == "open" or encrypted or room_type in UNENCRYPTED_TYPES:
            return True
        return room_id in self._clear_rooms or self.also_admitted(room_id)

    async def _authoriser(self, room: Room, user_id: str) -> str | None:
        """Who vouches for a restricted join: a local moderator if there is one, else somebody elsewhere; None if nobody has
        to. Raises Forbidden where no condition holds."""
        rule = (await room.content(*JOIN_RULES)).get("join_rule")
        if rule not in ("restricted", "knock_restricted") or room.members.get(user_id) in ("join", "invite"):
            return None
        if not await self.allowed_by(room, user_id):
            raise Forbidden(
                "You can't join this room: it is open to members of certain other rooms, and you are in none of them."
            )
        return await self.who_may_vouch(room)

    async def allowed_by(self, room: Room, user_id: str) -> bool:
        """Whether one of the room's `allow` conditions holds, as far as we can tell. Spec: rooms/v8/#authorisation-rules"""
        allow = (await room.content(*JOIN_RULES)).get("allow")
        for condition in (allow if isinstance(allow, list) else [])[:MAX_ALLOW_CONDITIONS]:
            if isinstance(condition, dict) and condition.get("type") == "m.room_membership":
                other = await self._rooms.get(str(condition.get("room_id")))
                if other is not None and other.local_joined and other.members.get(user_id) == "join":
                    return True
        return False

    async def who_may_vouch(self, room: Room, *, only_local: bool = False) -> str | None:
        levels = await room.levels()
        able = [u for u, m in room.members.items() if m == "join" and levels.user(u) >= levels.invite]
        local = sorted(u for u in able if server_of(u) == self._server_name)
        if local:
            return local[0]
        if only_local or not able:
            return None
        return min(able)

    # --- leave, and what others do to somebody

    async def leave(
        self, user_id: str, room_id: str, given: Mapping[str, Any] | None = None, *, ts: int | None = None
    ) -> None:
        room = await self._rooms.get(room_id)
        mine = self._rooms.membership(room_id, user_id)
        if room is None or mine is None:
            raise NotFound("You are not in this room.")
        if mine == "leave":
            # Who did not hear the answer asks again; what she asks for is so, and the room hears of it once.
            return
        if mine == "ban":
            raise Forbidden(
                "You are banned from this room, so there is nothing to leave. Forget it to see no more of it."
            )
        if mine == "invite" and self.before_turning_down is not None:
            await self.before_turning_down(user_id, room_id)
        if room.known and (room.local_joined or not room.servers):
            await self._change(room_id, sender=user_id, target=user_id, content=_member("leave", given), ts=ts)
            return
        await self._afar.leave(user_id, room)

    async def leave_everything(self, user_id: str) -> None:
        """For an account that ends. What can't be told to another server is left all the same."""
        for room_id, one in list(self._rooms.memberships(user_id).items()):
            if one.membership in ("join", "invite", "knock"):
                try:
                    await self.leave(user_id, room_id)
                except ApiError:
                    continue

    async def invite(
        self,
        sender: str,
        room_id: str,
        target: str,
        content: Mapping[str, Any] | None = None,
        *,
        ts: int | None = None,
    ) -> None:
        await self._rooms.require_joined(room_id, sender)
        self._rooms.require_open(room_id)
        room = await self._whole(room_id)
        if room.members.get(target) == "join":
            raise Forbidden(f"{target} is in this room already.")
        if room.members.get(target) == "ban":
            raise Forbidden(f"{target} is banned from this room. Lift the ban first.")
        local = server_of(target) == self._server_name
        if local and not await self._local_user_exists(target):
            raise NotFound(f"There is no account {target} on this server.")
        # Who is invited is shown by the name that they gave themselves.
        member = _member("invite", {k: v for k, v in (content or {}).items() if k not in IN_ROOMS})
        if local:
            await self._doors.invite(sender, target, room_id)
            member.update(await self._profiles.member_content(target))
            await self._change(room_id, sender=sender, target=target, content=member, ts=ts)
            return
        member = self._seal.outgoing(MEMBER, target, member)
        async with room.lock:
            event = await self._sender.judged(room, sender=sender, type=MEMBER, content=member, state_key=target)
        event = await self._sender.recommended(room, event)
        # What it builds on is on disk before another server hears of it.
        await self._db.settled()
        if room.dropped:
            raise ApiError("The room is busy repairing itself. Try again.", status=503)
        signed = await self._afar.invite(room, event)
        # The room may have moved on while the other server answered: then this is one event beside others.
        await self._admitted(signed, self._server_name, LOCAL)

    async def _admitted(self, event: Event, origin: str, marks: int) -> None:
        """An event of ours that another server has signed or taken as well. Raises Forbidden, RemoteError."""
        verdict = await self._receiver.admit(event, origin=origin, marks=marks)
        if verdict.outcome != "accepted":
            raise Forbidden(f"The room has changed meanwhile, and no longer allows this: {verdict.reason}.")

    async def kick(
        self, sender: str, room_id: str, target: str, given: Mapping[str, Any] | None = None, *, ts: int | None = None
    ) -> None:
        await self._rooms.require_joined(room_id, sender)
        room = await self._whole(room_id)
        if room.members.get(target) not in ("join", "invite", "knock"):
            raise Forbidden(f"{target} is not in this room.")
        await self._change(room_id, sender=sender, target=target, content=_member("leave", given), ts=ts)

    async def ban(
        self, sender: str, room_id: str, target: str, given: Mapping[str, Any] | None = None, *, ts: int | None = None
    ) -> None:
        await self._whole(room_id)
        await self._change(room_id, sender=sender, target=target, content=_member("ban", given), ts=ts)

    async def unban(
        self, sender: str, room_id: str, target: str, given: Mapping[str, Any] | None = None, *, ts: int | None = None
    ) -> None:
        await self._rooms.require_joined(room_id, sender)
        room = await self._whole(room_id)
        if room.members.get(target) != "ban":
            raise Forbidden(f"{target} is not banned from this room.")
        await self._change(room_id, sender=sender, target=target, content=_member("leave", given), ts=ts)

    async def knock(
        self, user_id: str, room_id: str, *, via: Sequence[str] = (), content: Mapping[str, Any] | None = None
    ) -> None:
        await self._doors.knock(user_id, room_id)
        room = await self._rooms.get(room_id)
        member = await self._own_member("knock", user_id, content)
        if room is not None and room.known and room.local_joined and room.partial is None:
            await self._change(room_id, sender=user_id, target=user_id, content=member)
            return
        await self._afar.knock(user_id, room_id, await self._servers_for(room_id, user_id, via, room), member)

    async def _whole(self, room_id: str) -> Room:
        """What somebody does to others needs to know what these are. Raises ApiError while the members are not known."""
        room = await self._rooms.whole(room_id)
        if room is None:
            raise NotFound("This room is not known here.")
        return room

    async def forget(self, user_id: str, room_id: str) -> None:
        mine = self._rooms.memberships(user_id).get(room_id)
        if mine is None:
            raise NotFound("You were never in this room.")
        if mine.membership not in ("leave", "ban"):
            raise ApiError("Leave the room before you forget it.", errcode="M_UNKNOWN")
        with self._db.write() as tx:
            tx.run("UPDATE memberships SET forgotten = 1 WHERE room_nid = $1 AND user_id = $2", mine.room_nid, user_id)
            tx.after(lambda: self._rooms.take_forgotten(room_id, user_id))
        await tx

    def tell_again(self, tx: Tx, user_id: str, room_id: str) -> None:
        """Her clients hear of an invite as if it came now."""
        mine = self._rooms.memberships(user_id).get(room_id)
        if mine is None or mine.membership != "invite":
            return
        pos = tx.pos()

        def take() -> None:
            mine.pos = pos

        tx.run(
            "UPDATE memberships SET pos = $3 WHERE room_nid = $1 AND user_id = $2 AND membership = 'invite'",
            mine.room_nid,
            user_id,
            pos,
        )
        tx.after(take)
        tx.ring((user_id,), room_id)

    async def update_profile(self, user_id: str, _changed: Mapping[str, Any] | None = None) -> None:
        """The member events of all joined rooms say what the profile says. A room that refuses keeps the old name."""
        profile = await self._profiles.member_content(user_id)
        for room_id in self._rooms.joined(user_id):
            room = await self._rooms.get(room_id)
            mine = await room.event(MEMBER, user_id) if room is not None else None
            if mine is None:
                continue
            kept = {k: v for k, v in mine.content.items() if k not in ("displayname", "avatar_url")}
            try:
                await self._sender.send(
                    room_id, sender=user_id, type=MEMBER, content={**kept, **profile}, state_key=user_id
                )
            except ApiError:
                continue

    async def _own_member(self, membership: str, user_id: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """What she says of herself when she comes, as far as the seal lets it pass."""
        content = {**await self._profiles.member_content(user_id), **_member(membership, given)}
        return self._seal.outgoing(MEMBER, user_id, content)

    async def _change(
        self, room_id: str, *, sender: str, target: str, content: dict[str, Any], ts: int | None = None
    ) -> Stored:
        """One member event in a room that we are in. The sender need not be in it: she may just be coming."""
        content = self._seal.outgoing(MEMBER, target, content)
        async with self._sender.draft(MEMBER, target) as draft:
            for _ in range(MAX_TRIES):
                room = await self._rooms.get(room_id)
                if room is None or not room.known:
                    raise NotFound("This room is not known here.")
                await draft.prepare(room)
                async with room.lock:
                    if room.dropped:
                        draft.forget()
                        continue
                    event = draft.ready(room)
                    if event is None:
                        event = await self._sender.judged(
                            room, sender=sender, type=MEMBER, content=content, state_key=target, ts=ts, asked=draft.held
                        )
                        if await draft.put_aside(room, event):
                            continue
                    if room.dropped:
                        continue
                    with self._db.write(chain=room_id) as tx:
                        one = self._appender.append(tx, room, event, marks=LOCAL)
                try:
                    await tx
                    return one
                except ChainBroken:
                    continue
        raise ApiError("The room is busy repairing itself. Try again.", status=503)


def _member(membership: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**{k: v for k, v in (given or {}).items() if k not in SERVERS_OWN}, "membership": membership}
