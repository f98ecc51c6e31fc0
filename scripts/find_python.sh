# Read by the other scripts: sets $root to this folder's parent, and $python to a Python from 3.11 that can make virtual
# environments. A name that is there but does not work (as version switchers leave them) is passed over.
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=
for candidate in python3.11 python3.12 python3.13 python3 python3.14 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "Python 3.11 or later is needed, with its venv module, and none was found." >&2
    echo "On Debian and Ubuntu: apt install python3 python3-venv. On Fedora: dnf install python3." >&2
    exit 1
fi
