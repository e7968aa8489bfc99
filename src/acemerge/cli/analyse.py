"""`acemerge analyse`: the papers' figures of any merge."""

from __future__ import annotations

from acemerge.cli.command import command
from acemerge.cli.options import CHOOSING, LOOKING, Options
from acemerge.cli.text import say, stderr, stdout, table


@command(
    "analyse",
    group="Judge",
    takes=(*LOOKING, *CHOOSING, "out", "overwrite", "quiet"),
    examples=(
        "acemerge analyse --base ./base --expert ./math --expert ./code -o ./figures",
        "acemerge analyse recipe.yaml --method ace",
    ),
    page="analyse.md",
    helps={"out": "folder for JSON, tables and pictures", "overwrite": "replace an earlier analysis"},
)
def analyse(asked: Options) -> None:
    """Merge without writing: gamma, spectra, principal directions and condition numbers of every layer."""
    from acemerge.cli.progress import progress
    from acemerge.engine.opening import check_output_apart, open_recipe
    from acemerge.inspection import analysis
    from acemerge.inspection.analysis_files import check_free, write_analysis
    from acemerge.inspection.analysis_tables import tables

    recipe, options = asked.asked_recipe(), asked.run_options()
    if asked.out is not None:
        check_output_apart(asked.out, recipe.models)
        check_free(asked.out, asked.overwrite)
    opened = open_recipe(recipe, None, options)
    data = open_recipe(analysis.with_data(recipe), None, options) if recipe.calibration else None
    with progress(stderr(), asked.quiet) as on_progress:
        found = analysis.analyse(opened, asked.workers, on_progress, data)
    written = [] if asked.out is None else write_analysis(found, asked.out)
    if asked.quiet:
        return
    for about, header, rows in tables(found):
        say(stdout(), about)
        table(stdout(), header, rows, numeric=header[1:])
        say(stdout(), "")
    for line in written:
        say(stdout(), line)
