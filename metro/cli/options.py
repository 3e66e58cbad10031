"""Commands from settings classes: every field is an option, typed once."""

import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from metro.utils.settings import Settings, flag_of, split_kind

METAVARS = {int: "INTEGER", float: "FLOAT", str: "TEXT", Path: "PATH"}


def settings_command(
    run: Callable[..., object],
    settings: type[Settings],
    *,
    example: str,
    resumes: bool = False,
    extra: Sequence[click.Parameter] = (),
) -> click.Command:
    """Make a command that builds ``settings`` from its options and ``--config``, and runs.

    Args:
        run: called with the settings, and with the values of ``extra`` by name. Its docstring is
            the command's help.
        settings: see `metro.utils.settings`.
        example: shown below the options.
        resumes: an interrupted run resumes when the same command is given again.
        extra: parameters of the command line alone.
    """
    own_names = [parameter.name for parameter in extra]
    kinds = get_type_hints(settings)
    title, parts = "Options", {part.name: part for part in fields(settings)}
    sections: dict[str, list[click.Parameter]] = {title: []}
    for name in dict.fromkeys([*settings.__annotations__, *parts]):  # its own ones first
        part = parts[name]
        title = part.metadata["section"] or title
        sections.setdefault(title, []).extend(parameters_of(part, kinds[part.name]))
    sections["Options"] += [*extra, _config_option(settings, extra)]

    def callback(config: str | None, **given: Any) -> object:
        own = {name: given.pop(name) for name in own_names}
        given = {name: None if value == () else value for name, value in given.items()}
        try:
            return run(settings.combine(config, given), **own)
        except KeyboardInterrupt:
            if not resumes:
                raise
            click.echo("interrupted: run the same command again to resume", err=True)
            raise click.exceptions.Exit(130) from None

    return _Command(
        sections,
        callback=callback,
        help=run.__doc__,
        epilog=f"\b\nExample:\n  {example}",
    )


def parameters_of(part: Field, kind: Any) -> list[click.Parameter]:
    """Make the option or argument of a field; the settings coerce and check its text."""
    about = part.metadata
    kind, _ = split_kind(kind)
    is_list = get_origin(kind) is list
    metavar = about["metavar"] or (
        f"[{'|'.join(about['choices'])}]"
        if about["choices"]
        else METAVARS.get(get_args(kind)[0] if is_list else kind)
    )
    if about["positional"]:
        return [
            click.Argument(
                [part.name],
                nargs=-1 if is_list else 1,
                required=False,
                metavar=flag_of(part),
                help=about["help"],
            )
        ]
    text = about["help"] + shown_default(part)
    flag = flag_of(part)
    if kind is bool:
        names = about["flag"] or f"{flag}/--no-{flag.removeprefix('--')}"
        return [click.Option([names, part.name], default=None, help=text)]
    names = [*(about["flag"] or flag).split(","), part.name]
    kind_of_option = _ManyOption if about["many"] else click.Option
    return [kind_of_option(names, multiple=is_list, metavar=metavar, help=text, type=str)]


class _ManyOption(click.Option):
    """Option of a list that takes more values than one: ``--input *.txt``."""


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[str(param.name)] = True
        click.echo(ctx.get_help())
        ctx.exit()


HELP_ALL = click.Option(
    ["--help-all"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Explain all options and exit.",
)


def _explain(
    title: str,
    params: Sequence[click.Parameter],
    ctx: click.Context,
    formatter: click.HelpFormatter,
) -> None:
    records = [
        record
        for part in params
        if isinstance(part, click.Option) and (record := part.get_help_record(ctx))
    ]
    with formatter.section(title):
        formatter.write_dl(records, col_max=20)


class _Command(click.Command):
    """Command with options of the kind above.

    They take all words up to the next option; in a command without a list of arguments, also the
    words behind other options. The single arguments, such as MODEL, come first.

    Args:
        sections: heading -> parameters. ``--help`` has the first paragraph of the help, explains
            the first section and names the other options; ``--help-all`` explains all.
    """

    def __init__(self, sections: dict[str, list[click.Parameter]], **about: Any):
        params = itertools.chain.from_iterable(sections.values())
        params_sorted = sorted(params, key=lambda part: isinstance(part, click.Option))
        super().__init__(None, params=params_sorted, **about)
        self.sections = sections

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        return [*params, HELP_ALL] if len(self.sections) > 1 else params

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        full = self.help
        if len(self.sections) > 1 and full and not ctx.meta.get(HELP_ALL.name):
            self.help = full.split("\n\n")[0]
        super().format_help_text(ctx, formatter)
        self.help = full

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        first, *others = self.sections.items()
        known = set(self.params)
        general = [part for part in self.get_params(ctx) if part not in known]
        _explain(first[0], [*first[1], *general], ctx, formatter)
        if not others:
            return
        if ctx.meta.get(HELP_ALL.name):
            for title, params in others:
                _explain(title, params, ctx, formatter)
            return
        width = formatter.width - max(len(title) for title, _ in others) - 6
        with formatter.section("More, which --help-all explains"):
            names = [
                (title, ", ".join(part.opts[0] for part in params)) for title, params in others
            ]
            formatter.write_dl(
                [
                    (title, "\b\n" + textwrap.fill(text, width, break_on_hyphens=False))
                    for title, text in names
                ]
            )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = {
            name: part for part in self.params for name in (*part.opts, *part.secondary_opts)
        }
        many = [part for part in self.params if isinstance(part, _ManyOption)]
        arguments = [part for part in self.params if isinstance(part, click.Argument)]
        is_open = all(part.nargs == 1 for part in arguments)
        always = many[0].opts[0] if len(many) == 1 and is_open else None
        current, num_open = always, sum(part.nargs == 1 for part in arguments)
        parsed: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                parsed += [word, *words]
            elif word.startswith("-") and word != "-":
                name, is_joined, _ = word.partition("=")
                option = options.get(name)
                current = name if isinstance(option, _ManyOption) else always
                parsed.append(word)
                if isinstance(option, click.Option) and not option.is_flag and not is_joined:
                    parsed += itertools.islice(words, option.nargs)
            elif num_open or current is None:
                num_open = max(0, num_open - 1)
                parsed.append(word)
            else:
                parsed += [current, word]
        return super().parse_args(ctx, parsed)


def shown_default(part: Field) -> str:
    """Word the default of an option for ``--help``."""
    if part.default_factory is not MISSING:
        return f"  [default: {', '.join(map(str, part.default_factory()))}]"
    if part.default is MISSING:
        return "  [required]"
    return "" if part.default is None or part.default is False else f"  [default: {part.default}]"


def _config_option(settings: type[Settings], extra: Sequence[click.Parameter]) -> click.Option:
    about = "YAML file of options"
    alone = [
        parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
        for parameter in extra
    ]
    if alone:
        about += f" (all but {', '.join(alone)})"
    if shipped := settings.shipped():
        about += f", or one of METRO's: {', '.join(shipped)}"
    return click.Option(["--config"], metavar="FILE", help=f"{about}. Options override it.")
