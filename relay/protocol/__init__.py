"""The rules of Matrix, pure: no await, no clock, no database, no log. What comes in is judged, nothing is kept.

Bytes: `canonical` (JSON that is hashed and signed), `signing` (keys and signed objects).
Events: `versions` (what differs between room versions), `event` (parse, load, build), `redaction` (what is left).
Judgement: `power` (levels), `membership` (rule 6), `auth` (all rules), `judge` (the verdict on a peer's event),
`resolve` (one state from several).
For people: `visibility` (who may see an event), `pushrules` (who is told), `globs` (patterns, server ACLs).
Ours: `seal` (what may be in clear, the one table; `shapes` of its keys, `readable` media).
Spec: rooms/, server-server-api/, appendices/.
"""
