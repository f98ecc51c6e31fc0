"""One relay, two people in a room, and a stranger's server that has joined it: whatever it does, the two must not notice."""

from __future__ import annotations

from typing import Any

from tests.fuzz.answers import Answer, require_proper
from tests.fuzz.overheard import Ears
from tests.fuzz.stranger import Stranger
from tests.people import Person, ciphertext
from tests.town import Town, Within


class Scene:
    def __init__(self, town: Town, ears: Ears) -> None:
        self.town = town
        self.ears = ears
        self.good: list[str] = []

    async def opens(self) -> Scene:
        self.house: Within = await self.town.relay("one")
        self.alice, self.bob = await self.town.users("alice@one", "bob@one")
        self.room_id = await self.alice.creates_room(with_=self.bob, preset="public_chat")
        self.stranger = await Stranger(self.town).opens()
        self.room = await self.stranger.joins(self.house, self.room_id)
        return self

    @property
    def known(self) -> tuple[str, ...]:
        """IDs that exist, here and there."""
        stranger, room = self.stranger, self.room
        return (
            self.room_id,
            self.alice.id,
            stranger.user,
            stranger.name,
            self.house.name,
            room.last.id,
            *(e.id for e in room.state.values()),
        )

    async def sends_with_a_good_one(self, pdus: list[Any], edus: Any = ()) -> dict[str, Any]:
        """A transaction of these and, behind them, an event that nothing is wrong with. What the relay says of the others."""
        good = self.room.event(content=ciphertext())
        answer = await self.stranger.sends(self.house, [*pdus, good.pdu], edus)
        require_proper(answer, f"{pdus!r:.500}")
        assert answer.status == 200, f"one bad event is no reason to refuse the others: {answer.json}, {pdus!r:.500}"
        results = dict(answer.json["pdus"])
        assert all(isinstance(one, dict) and isinstance(one.get("error", ""), str) for one in results.values()), (
            "the standard's form"
        )
        assert results.pop(good.id, None) == {}, (
            f"the good event beside the bad ones is taken: {answer.json}, {pdus!r:.500}"
        )
        self.room.said(good)
        self.good.append(good.id)
        self.ears.nothing_broke()
        return results

    async def nothing_is_lost(self) -> None:
        """Everything good arrived, once, and the two go on talking."""
        history = [event["event_id"] for event in await self.bob.history(self.room_id)]
        for event_id in self.good:
            assert history.count(event_id) == 1, "a good event among bad ones arrives, once"
        sent = await self.alice.sends(self.room_id)
        assert await self.bob.sees(sent), "two people of the relay talk as if nothing had been"
        self.ears.nothing_broke()

    def refused(self, results: dict[str, Any], event_id: str) -> bool:
        return bool(results.get(event_id, {}).get("error"))

    async def is_nowhere(self, event_id: str, person: Person | None = None) -> bool:
        try:
            await (person or self.bob).event(self.room_id, event_id)
        except Exception:
            return True
        return False


def refusal(answer: Answer, what: str) -> str:
    """The errcode of an answer that must be a refusal."""
    require_proper(answer, what)
    assert 400 <= answer.status < 500, f"{what}: should be refused, got {answer.status} {answer.body[:300]!r}"
    return answer.errcode
