"""The command line: `relay serve`, and what an operator does beside it.

Commands speak to the running relay over its socket; where none runs they take the folder's lock, open the relay without
listeners, and do the same thing there. What the operator can mend is told in a sentence and exit status 1 (2 for a command
that was not understood), never with a traceback. Not here: what a command does (the parts), or what `check` looks at.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson

from relay import answers, checkup, classifier_line, config_example, control, folder, hook_commands, peer_commands
from relay.config import ConfigError, Duration, Listener
from relay.moderating import Moderating
from relay.moderator_line import ModeratorLine, first_keys_words
from relay.proof_line import ProofLine
from relay.serving import OperatorError, offline, serve


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (ConfigError, OperatorError, control.CommandFailed, control.Taken, folder.FolderError) as refused:
        print(f"relay: {refused}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough; without this Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# --- the relay itself ----------------------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> int:
    name = arguments.server_name or os.environ.get("RELAY_SERVER_NAME") or None
    return serve(arguments.data, name, arguments.port, program=_program())


def _init(arguments: argparse.Namespace) -> int:
    data_dir: Path = arguments.data
    name = arguments.server_name or os.environ.get("RELAY_SERVER_NAME") or None
    if name is None and not (data_dir / "relay.yaml").exists():
        raise OperatorError(
            "Which server name? It is the part after the colon in user IDs and can't be changed later: "
            "relay init --server-name example.org (or localhost, to try it out)"
        )
    listener = Listener()
    given = {"address": arguments.address, "port": arguments.port, "trusted_proxies": arguments.trusted_proxy}
    try:
        listener = msgspec.structs.replace(
            listener, **{key: value for key, value in given.items() if value is not None}
        )
    except ValueError as bad:
        raise OperatorError(f"{bad}.") from None
    done = folder.make(data_dir)
    with control.locked(data_dir):
        prepared = folder.prepare(
            data_dir, name, listener, performer=arguments.performer, public_base_url=arguments.public_base_url
        )
    for line in (*done, *prepared.done):
        print(line)
    if not prepared.done:
        print(f"{data_dir} is ready already; nothing was changed.")
    print(f"Start the relay with: {_program()} serve --data {answers.shown(data_dir)}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    data_dir: Path = arguments.data
    running = control.is_running(data_dir)
    found, settings = checkup.look(data_dir, running=running)
    if settings is not None and not any(finding.severity == "error" for finding in found):
        if running or (data_dir / settings.database.path).exists():
            try:
                found += [checkup.Finding(**finding) for finding in _command(data_dir, "check", {})]
            except (OperatorError, control.CommandFailed, control.Taken) as refused:
                found.append(checkup.Finding("error", str(refused)))
        else:
            found.append(checkup.Finding("ok", "There is no database yet; the first start makes it."))
    errors = sum(finding.severity == "error" for finding in found)
    warnings = sum(finding.severity == "warning" for finding in found)
    if arguments.json:
        _print_json([{"severity": one.severity, "what": one.what, "todo": one.todo} for one in found])
    else:
        for one in found:
            print(f"{one.severity:<8} {one.what}" + (f"\n         {one.todo}" if one.todo else ""))
        print(f"{errors} errors, {warnings} warnings.")
    return 1 if errors else 0


def _config_example(_: argparse.Namespace) -> int:
    print(config_example.example(), end="")
    return 0


# --- commands that the relay carries out ---------------------------------------------------------------------------


def _command(data_dir: Path, name: str, args: Mapping[str, Any]) -> Any:
    try:
        return asyncio.run(control.call(data_dir, name, args))
    except control.NotRunning:
        return offline(data_dir, name, args)


def _running(data_dir: Path, name: str) -> Any:
    """For what makes sense only in a relay that runs."""
    try:
        return asyncio.run(control.call(data_dir, name, {}))
    except control.NotRunning as absent:
        raise OperatorError(str(absent)) from None


def _user_add(arguments: argparse.Namespace) -> int:
    localpart = folder.user_id(arguments.name, folder.load_settings(arguments.data))[1:].partition(":")[0]
    args = {"localpart": localpart, "password": _password(arguments), "admin": arguments.admin}
    result = _command(arguments.data, "user.add", args)
    keys = ModeratorLine(_command, _tell).first_keys(arguments.data, result["user_id"]) if arguments.admin else None
    if keys is None:
        return _tell(arguments, result, answers.user_added)
    words = "\n".join([answers.user_added(result), first_keys_words(result["user_id"], keys)])
    return _tell(arguments, {**result, **keys}, lambda _: words)


def _user_list(arguments: argparse.Namespace) -> int:
    return _tell(arguments, _command(arguments.data, "user.list", {}), answers.users)


def _user_password(arguments: argparse.Namespace) -> int:
    args = {"user": _user(arguments), "password": _password(arguments)}
    return _tell(arguments, _command(arguments.data, "user.password", args), answers.password_set(args["user"]))


def _user_admin(arguments: argparse.Namespace) -> int:
    user, admin = _user(arguments), not arguments.remove
    result = _command(arguments.data, "user.admin", {"user": user, "admin": admin})
    return _tell(arguments, result, answers.admin_set(user, admin))


def _user_restrain(command: str, flag: str, value: bool, words: Callable[[str], Callable[[Any], str]]) -> Any:
    def run(arguments: argparse.Namespace) -> int:
        user = _user(arguments)
        return _tell(arguments, _command(arguments.data, command, {"user": user, flag: value}), words(user))

    return run


def _user_deactivate(arguments: argparse.Namespace) -> int:
    user = _user(arguments)
    return _tell(arguments, _command(arguments.data, "user.deactivate", {"user": user}), answers.deactivated(user))


def _token_create(arguments: argparse.Namespace) -> int:
    given = {"token": arguments.token, "uses": arguments.uses, "expires_ms": arguments.expires}
    args = {key: value for key, value in given.items() if value is not None}
    return _tell(arguments, _command(arguments.data, "token.create", args), answers.token_created)


def _token_list(arguments: argparse.Namespace) -> int:
    return _tell(arguments, _command(arguments.data, "token.list", {}), answers.tokens)


def _token_revoke(arguments: argparse.Namespace) -> int:
    result = _command(arguments.data, "token.revoke", {"token": arguments.token})
    return _tell(arguments, result, lambda _: "The token no longer opens anything.")


def _audit(arguments: argparse.Namespace) -> int:
    if arguments.columns:
        return _tell(arguments, _command(arguments.data, "columns", {}), answers.columns)
    result = _command(arguments.data, "audit", {})
    _tell(arguments, result, answers.audit)
    return 1 if result["findings"] else 0


def _seal(arguments: argparse.Namespace) -> int:
    return _tell(arguments, offline(arguments.data, "seal", {}), answers.sealed)


def _status(arguments: argparse.Namespace) -> int:
    return _tell(arguments, _running(arguments.data, "status"), answers.status)


def _reload(arguments: argparse.Namespace) -> int:
    return _tell(arguments, _running(arguments.data, "reload"), answers.reloaded)


# --- asking and telling --------------------------------------------------------------------------------------------


def _tell(arguments: argparse.Namespace, result: Any, words: Callable[[Any], str]) -> int:
    if arguments.json:
        _print_json(result)
    else:
        print(words(result))
    return 0


def _print_json(value: Any) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _user(arguments: argparse.Namespace) -> str:
    return folder.user_id(arguments.name, folder.load_settings(arguments.data))


def _password(arguments: argparse.Namespace) -> str:
    if arguments.password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    elif not sys.stdin.isatty():
        raise OperatorError("There is no terminal to ask for the password. Pipe it in and add --password-stdin.")
    else:
        password = getpass.getpass(f"Password for {arguments.name}: ")
        if password != getpass.getpass("The same once more: "):
            raise OperatorError("The two passwords differ. Nothing was changed; try again.")
    if not password:
        raise OperatorError("The password is empty. Nothing was changed; try again.")
    return password


def _program() -> str:
    """How the operator called us, for lines that can be copied."""
    return "python -m relay" if sys.argv[0].endswith("__main__.py") else answers.shown(Path(sys.argv[0]).absolute())


# --- the grammar ---------------------------------------------------------------------------------------------------


def _lifetime(text: str) -> int:
    try:
        return int(Duration.parse(text))
    except ValueError as bad:
        raise argparse.ArgumentTypeError(str(bad)) from None


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number from 0 to 65535")
    return int(text)


class _Grammar:
    """One subcommand after the other, each with its help, its examples and --data."""

    def __init__(self, parser: argparse.ArgumentParser, path: str = "relay") -> None:
        self._path = path
        self._commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int],
        help_text: str,
        example: str,
        *,
        data: bool = True,
        json: bool = True,
    ) -> argparse.ArgumentParser:
        parser = self._commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=f"example: {self._path} {name} {example}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run=run, json=False)
        if data:
            parser.add_argument(
                "--data", type=Path, default=Path("data"), metavar="DIR", help="the data folder (default: ./data)"
            )
        if json:
            parser.add_argument("--json", action="store_true", help="print JSON, for programs")
        return parser

    def group(self, name: str, help_text: str) -> _Grammar:
        return _Grammar(self._commands.add_parser(name, help=help_text, description=help_text), f"{self._path} {name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relay",
        description="Sealed Relay: a federated Matrix server that stores only ciphertext and routing metadata.",
        epilog="examples:\n  relay serve --data data --server-name example.org\n  relay user add alice --admin --data data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    grammar = _Grammar(parser)
    for name, run, help_text in (
        ("serve", _serve, "run the relay in the foreground; the first start makes config, key and database"),
        ("init", _init, "make the data folder, config and signing key without starting"),
    ):
        command = grammar.add(name, run, help_text, "--server-name example.org --data data", json=False)
        command.add_argument(
            "--server-name",
            metavar="NAME",
            help="the name, on the first start (or RELAY_SERVER_NAME; serve takes localhost without); can't be changed",
        )
        if name == "init":
            command.add_argument(
                "--performer",
                action="store_true",
                help="for a performer's own relay: invites of strangers are held back until she lets them in",
            )
            command.add_argument(
                "--public-base-url",
                metavar="URL",
                help="where apps reach the relay, for a new config, such as https://matrix.example.org",
            )
            command.add_argument("--address", metavar="IP", help="where the relay listens (default: 127.0.0.1)")
            command.add_argument(
                "--trusted-proxy",
                type=lambda text: tuple(text.split(",")),
                metavar="NETWORKS",
                help="reverse proxies that are believed about who calls, such as 172.16.0.0/12",
            )
        command.add_argument(
            "--port",
            type=_port,
            metavar="N",
            help="port of the first listener; written to a new config, else for this run",
        )
    grammar.add("check", _check, "look over config, keys, database, ports, disk and clock", "--data data")
    grammar.add("status", _status, "say whether the relay on a data folder runs and answers", "--data data")
    grammar.add("reload", _reload, "take up the config's lists of servers without a restart", "--data data")
    audit = grammar.add(
        "audit", _audit, "count what is stored by the rule that lets it exist; name what has none", "--data data"
    )
    audit.add_argument("--columns", action="store_true", help="list every stored column, what for and for how long")
    grammar.add(
        "seal", _seal, "redact for good what privacy.seal no longer allows; the relay must not run", "--data data"
    )

    peer_commands.grow(grammar, _tell, _command)
    hook_commands.grow(grammar, _tell, _command)
    classifier_line.grow(grammar, _tell)

    users = grammar.group("user", "accounts")
    add = users.add("add", _user_add, "make an account", "alice --admin --data data")
    add.add_argument("--admin", action="store_true", help="may administer the relay")
    users.add("list", _user_list, "list the accounts", "--json --data data")
    password = users.add(
        "password", _user_password, "set a password and end all sessions", "alice --password-stdin --data data"
    )
    admin = users.add("admin", _user_admin, "let an account administer the relay", "alice --data data")
    admin.add_argument("--remove", action="store_true", help="take it back")
    deactivate = users.add("deactivate", _user_deactivate, "close an account for good", "alice --data data")
    restraints = [
        users.add(name, _user_restrain(f"user.{called}", flag, value, words), help_text, "alice --data data")
        for name, called, flag, value, words, help_text in (
            ("lock", "lock", "locked", True, answers.locked, "keep an account from being used, until it is unlocked"),
            ("unlock", "lock", "locked", False, answers.unlocked, "let a locked account be used again"),
            (
                "suspend",
                "suspend",
                "suspended",
                True,
                answers.suspended,
                "let an account only read, until it is lifted",
            ),
            ("unsuspend", "suspend", "suspended", False, answers.unsuspended, "lift a suspension"),
        )
    ]
    for command in (add, password, admin, deactivate, *restraints):
        command.add_argument("name", metavar="NAME", help="alice, or @alice:example.org")
    for command in (add, password):
        command.add_argument("--password-stdin", action="store_true", help="read the password from standard input")

    tokens = grammar.group("token", "registration tokens, for registration.mode: token")
    create = tokens.add("create", _token_create, "make a token", "--uses 5 --expires 7d --data data")
    create.add_argument("--token", metavar="TEXT", help="the token itself (default: a random one)")
    create.add_argument("--uses", type=int, metavar="N", help="how many accounts it may make (default: any number)")
    create.add_argument(
        "--expires", type=_lifetime, metavar="TIME", help="how long it lives, such as 12h or 7d (default: for ever)"
    )
    tokens.add("list", _token_list, "list the tokens and how often each was used", "--data data")
    revoke = tokens.add("revoke", _token_revoke, "make a token worthless", "TOKEN --data data")
    revoke.add_argument("token", metavar="TOKEN")

    Moderating(_command, _tell).join(grammar)
    ModeratorLine(_command, _tell).join(grammar)
    ProofLine(_tell).join(grammar)

    settings = grammar.group("config", "the config file")
    settings.add(
        "example",
        _config_example,
        "print every setting with its explanation and default",
        "> config.example.yaml",
        data=False,
        json=False,
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
