// The desk: this browser remembers how far the audit log had come, and says so where the log no longer holds that row.
"use strict";

const KEPT = "relay.log.kept";

async function compare() {
  const warning = document.getElementById("log-warning");
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem(KEPT)); } catch { /* nothing usable was kept */ }
  if (kept && Number.isSafeInteger(kept.seq)) {
    let row;
    try {
      const answer = await fetch(`/_relay/desk/log/${kept.seq}`, { headers: { Accept: "application/json" }, redirect: "error" });
      row = answer.ok ? await answer.json() : answer.status === 404 ? {} : null;
    } catch {
      return;
    }
    if (row === null) return;
    if (row.hash !== kept.hash) {
      warning.textContent = `This audit log is not the one that this browser saw before: row ${kept.seq} is missing or was changed. `
        + "A backup was restored, or somebody changed the log. Don't go on before you know which. "
        + `(Seen then: ${kept.hash})`;
      warning.hidden = false;
      return;
    }
  }
  const newest = document.querySelector("[data-newest-seq]");
  if (newest && (!kept || Number(newest.dataset.newestSeq) > kept.seq)) {
    localStorage.setItem(KEPT, JSON.stringify({ seq: Number(newest.dataset.newestSeq), hash: newest.dataset.newestHash }));
  }
}

document.querySelector(".tabs [aria-current]")?.scrollIntoView({ inline: "center", block: "nearest" });
if (document.getElementById("log-warning")) compare();
