"""The table of room versions says what the standard's feature lists say."""

from __future__ import annotations

import pytest

from relay.protocol.versions import DEFAULT, VERSIONS


def names_where(feature: str) -> list[str]:
    return [name for name, version in VERSIONS.items() if getattr(version, feature)]


def through(first: int, last: int) -> list[str]:
    return [str(number) for number in range(first, last + 1)]


@pytest.mark.parametrize(
    ("feature", "first", "last"),
    [
        ("event_id_urlsafe", 4, 12),
        ("strict_keys", 5, 12),
        ("strict_json", 6, 12),
        ("notifications_levels", 6, 12),
        ("aliases_rule", 3, 5),
        ("redact_keeps_aliases", 3, 5),
        ("knock", 7, 12),
        ("restricted", 8, 12),
        ("redact_keeps_allow", 8, 12),
        ("redact_keeps_authoriser", 9, 12),
        ("knock_restricted", 10, 12),
        ("integer_levels", 10, 12),
        ("create_creator", 3, 10),
        ("redact_keeps_origin", 3, 10),
        ("redacts_in_content", 11, 12),
        ("redact_keeps_create", 11, 12),
        ("redact_keeps_third_party", 11, 12),
        ("redact_keeps_invite_level", 11, 12),
        ("redact_keeps_redacts", 11, 12),
        ("room_id_is_create", 12, 12),
        ("creators_privileged", 12, 12),
    ],
)
def test_a_feature_holds_from_one_version_to_another(feature: str, first: int, last: int) -> None:
    assert names_where(feature) == through(first, last), f"{feature} belongs to versions {first} to {last}"


def test_versions_3_to_12_are_known_and_12_is_the_default() -> None:
    assert list(VERSIONS) == through(3, 12), "these versions are supported"
    assert DEFAULT == "12", "new rooms are of version 12"
    assert all(version.name == name == str(version) for name, version in VERSIONS.items()), "each knows its name"


def test_state_resolution_and_depth() -> None:
    assert {name for name, v in VERSIONS.items() if v.state_res == "v2.1"} == {"12"}, "only version 12 resolves by v2.1"
    assert {name for name, v in VERSIONS.items() if v.max_depth == 2**53 - 1} == set(through(6, 12)), (
        "depth has 53 bits where canonical JSON is enforced"
    )
