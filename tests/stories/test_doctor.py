"""`relay doctor` as an operator meets it: against a relay that runs, one that does not, and with a second one's help."""

from __future__ import annotations

import json

from tests.town import Town


async def test_an_operator_asks_what_is_wrong(town: Town) -> None:
    one = await town.relay_apart("one")
    two = await town.relay("two")
    code, said = await one.command("doctor", "--ask", two.name)
    assert code == 0, said
    assert "reaches this relay, from outside" in said and "publishes this relay's signing key" in said
    code, said = await one.command("doctor", "--json")
    found = json.loads(said)
    assert code == 0 and {one["severity"] for one in found} <= {"ok", "warning"}
    assert all(set(one) == {"subject", "severity", "what", "todo"} for one in found)
    assert {"dns", "certificate", "key", "answers", "others"} <= {one["subject"] for one in found}
    code, said = await one.command("doctor", "--ask", "not a name")
    assert code == 1 and "such as matrix.org" in said
    (one.folder / "tls.crt").write_bytes((one.folder / "ca.crt").read_bytes())
    await one.stop()
    code, said = await one.command("doctor", "--json")
    found = json.loads(said)
    assert code == 1 and found[-1]["todo"] == "Start it, and run relay doctor again."
    assert any("do not belong together" in one["what"] for one in found), "what check would find is told too"
