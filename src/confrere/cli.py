"""The command line: few verbs, every choice as ``key.path=value``. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from confrere.anonymise.commands import add_to as add_anonymise
from confrere.audits.commands import add_to as add_audits
from confrere.commands import add_to
from confrere.console import carry_out, console, report_on, say, start
from confrere.consortium.commands import add_to as add_consortium
from confrere.errors import ConfrereError, DataError, RunError, printable
from confrere.flower.commands import add_to as add_flower
from confrere.forgetting.commands import add_to as add_forgetting
from confrere.watch.commands import add_to as add_watch

app = typer.Typer(
    name="confrere",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hospitals fine-tune one frozen vision model together; each learns whether joining paid.",
    epilog="Exit codes: 0 done, 2 wrong option or experiment, 3 data, 4 backbone, 5 run directory or no site "
    "answered, 8 missing package, 9 certificate, key or network, 10 a site's policy, 11 an audit above its "
    "bound, 130 interrupted (resume continues).",
)
data_app = typer.Typer(no_args_is_help=True, help="Check or fetch data; nothing is trained.")
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, e.g. train.lr=1e-3", show_default=False)]
Data = Annotated[Path, typer.Argument(help="folder of sites, CSV or federation.toml", show_default=False)]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where the generated images and the run go")] = Path("demo"),
    backbone: Annotated[str, typer.Option(help="backbone")] = "dinov2-small-imgfocus",
    overrides: Overrides = None,
) -> None:
    """Watch four generated hospitals fine-tune a real pretrained model together; needs no data."""
    from confrere.demo import DEMO, make_demo_data

    if (out / "run" / "backbone.json").exists() and not overrides:
        return resume(out / "run")
    data = make_demo_data(out / "hospitals")
    say("", "Four hospitals, generated microscopy.")
    say(
        "The images are synthetic (stain, illumination, resolution and "
        "class mix differ by site; patients have several images): they show the mechanics, not medicine. "
        "The backbone's weights are real and pretrained."
    )
    return start(data, out / "run", {**DEMO, "backbone": {**DEMO["backbone"], "name": backbone}}, overrides or [])


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="folder of sites, CSV, federation.toml or experiment.toml")],
    out: Annotated[Path, typer.Option(help="run directory, new or empty")],
    overrides: Overrides = None,
    method: Annotated[str | None, typer.Option(help="see `confrere methods`")] = None,
    rounds: Annotated[int | None, typer.Option(help="federated rounds", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="of training", min=0)] = None,
    backbone: Annotated[str | None, typer.Option(help="see `confrere backbones`")] = None,
    hold_out: Annotated[str | None, typer.Option(help="a site that only tests the general model")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of an experiment")] = None,
    quiet: Annotated[bool, typer.Option(help="print nothing but errors")] = False,
) -> None:
    """Train a method and its controls on hospitals' images and write the report."""
    from confrere.arguments import named
    from confrere.data.paths import slug

    path, values = named(path, config)
    options = {"rounds": rounds, "seed": seed, "hold_out": slug(hold_out) if hold_out else None}
    values |= {key: value for key, value in options.items() if value is not None}
    if method is not None:
        values["method"] = {"name": method}
    model = [f"backbone.name={json.dumps(backbone)}"] if backbone is not None else []
    start(path, out, values, [*model, *(overrides or [])], quiet=quiet)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="directory of a run that was stopped")],
    accept_drift: Annotated[bool, typer.Option(help="continue although packages or threads changed")] = False,
    quiet: Annotated[bool, typer.Option(help="print nothing but errors")] = False,
) -> None:
    """Continue a run that was stopped, to the bytes it would have had."""
    from confrere.fingerprint import stored_experiment

    if (run / "job.json").exists():
        fix = f"confrere coordinator KIT --out {run}"
        raise RunError("this run is across hospitals", where=str(run), fix=fix, code="across-hospitals")
    carry_out(stored_experiment(run), run, quiet=quiet, accept_drift=accept_drift)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="directory of a run or comparison")]) -> None:
    """Write report.html, report.json and card.md of a run anew."""
    report_on(run)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="directory of a finished run")],
    images: Annotated[Path, typer.Argument(help="folder of images")],
    site: Annotated[str, typer.Option(help="whose model")],
    out: Annotated[Path, typer.Option(help="CSV to write")],
    overlay: Annotated[int, typer.Option(help="also draw where the model looks, for the first N images", min=0)] = 0,
) -> None:
    """Write calibrated class probabilities of new images."""
    from confrere.data.paths import slug
    from confrere.predict import predict_folder

    count, problems = predict_folder(run, slug(site), images, out, overlays=overlay, note=say)
    for problem in problems:
        say(f"left out {problem}")
    say(f"{count} images, {len(problems)} left out: ", out)


@app.command()
def compare(
    data: Annotated[list[str], typer.Argument(help="DATA [DATA2 ...] [key.path=value ...]", show_default=False)],
    methods: Annotated[str, typer.Option(help="a,b:key=value,c; the first is tested against the others")],
    out: Annotated[Path, typer.Option(help="directory; finished trainings in it are kept")],
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    tune: Annotated[int, typer.Option(help="trials of tuning, as many for every method", min=0)] = 0,
    controls: Annotated[bool, typer.Option(help="add local and pooled training")] = True,
    target: Annotated[float | None, typer.Option(help="validation score to price", min=0, max=1)] = None,
    jobs: Annotated[int, typer.Option(help="trainings at a time, each in its own process", min=1)] = 1,
    config: Annotated[Path | None, typer.Option(help="TOML file of an experiment")] = None,
) -> None:
    """Train several methods with several seeds on one or more data sets and compare them fairly."""
    from confrere.arguments import check_places
    from confrere.compare.command import carry_out, sort_out

    paths, overrides = sort_out(data)
    for path in paths:
        check_places(path, out)
    kept: dict[str, Any] = {"methods": methods, "seeds": seeds, "out": out, "jobs": jobs, "trials": tune}
    found = carry_out(paths, overrides, **kept, controls=controls, target=target, config=config)
    for one in found["recommendation"]["sentences"]:
        say(f"  {one['text']}")
    say("", found["recommendation"]["headline"])
    report_on(out)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """List the methods: what they send, keep and need."""
    from confrere.listing import method_rows, show

    show(method_rows(), ("name", "sends", "keeps", "needs", "paper"), as_json)


@app.command()
def backbones(as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """List the backbones known by name."""
    from confrere.listing import backbone_rows, show

    show(backbone_rows(), ("name", "source", "licence", "input", "blocks"), as_json)


@data_app.command("check")
def data_check(
    path: Data,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    overrides: Overrides = None,
) -> None:
    """Say what is in PATH, what is wrong with it, and how it would be split."""
    from confrere.config import override, validate
    from confrere.data.check import check, render_check

    experiment = validate(override({"path": str(path)}, overrides or []))
    found = check(path, experiment.data, seed=experiment.split_seed)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        console().print(render_check(found))
    if not found["ok"]:
        raise typer.Exit(DataError.exit_code)


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="ham10000 or medmnist:<flag>, e.g. medmnist:bloodmnist")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    endpoint: Annotated[str | None, typer.Option(help="another server than the public one")] = None,
) -> None:
    """Fetch a public data set (needs internet)."""
    from confrere.data.download import get

    say("Data: ", get(name, out, endpoint=endpoint))


def main() -> None:
    """Run the command line; errors are one message and a meaningful exit code, never a traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets question marks
    try:
        app()
    except ConfrereError as error:
        typer.echo("confrere: " + printable(f"{error}\n  Code: {error.code}", keep="\n"), err=True)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(0) from None
    except Exception as error:
        if os.environ.get("CONFRERE_DEBUG"):
            raise
        # The text of a foreign error may hold file names or data: show only where it came from.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = error.strerror if isinstance(error, OSError) else f"internal error {type(error).__name__}"
        typer.echo(f"confrere: {what} [{Path(frame.filename).name}, line {frame.lineno}]", err=True)
        fix = "run again with CONFRERE_DEBUG=1 and report what it prints; `confrere resume` continues"
        typer.echo(f"  Fix: {fix}", err=True)
        if isinstance(error, OSError):
            _discard_output()
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == 130 and not end.__suppress_context__:  # typer's own end of Ctrl-C, which says nothing
            typer.echo("confrere: interrupted; `confrere resume RUN` continues, a comparison its own command", err=True)
        raise


def _discard_output() -> None:
    """Let what is still buffered go nowhere: Python would fail once more when it writes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


add_to(app)
add_anonymise(app)
add_audits(app)
add_consortium(app)
add_flower(app)
add_watch(app)
add_forgetting(app)
