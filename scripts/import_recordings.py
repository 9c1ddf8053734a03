"""Import recordings that you have: sound with transcripts, robot episodes, motion capture, tables of sensor values.

examples:
  python scripts/import_recordings.py --input speech/ --output recordings/speech
  python scripts/import_recordings.py --input arm_episodes/ --output recordings/arm --image_size 96
  python scripts/import_recordings.py --input mocap/ --output recordings/mocap --split_group "^(\\d+)_"
  python scripts/import_recordings.py --input phone.csv.d/ --output recordings/phone --label_column activity
  python scripts/import_recordings.py --input recordings/a recordings/b --output recordings/both

Reads LeRobot data sets (v2.0 to v3), sound files with tables or files of words, .bvh, .csv, .tsv and .parquet, folders
of recordings, and data sets with columns of sound or pictures here or on the Hub. What cannot be used is named in the
report, the rest goes on. Writes a folder that datasets.load_from_disk opens, with recordings.json (names, statistics,
report) and recordings.png (some recordings on a time line). docs/recordings.md has the layouts.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", type=user_path, required=True, metavar="NAME", help="folders, or data sets on the Hub")
    add("--output", type=user_path, required=True, metavar="FOLDER", help="a folder that does not exist yet")
    formats = ("auto", "lerobot", "audio", "bvh", "table", "recordings", "datasets")
    add("--format", choices=formats, default="auto", help="default auto: what lies in the folder says it")
    add("--image_size", type=int, default=64, metavar="N", help="pixels on the shorter side (default 64)")
    add("--image_rate", type=float, default=12.5, metavar="HZ", help="pictures a second, at most (default 12.5)")
    add(
        "--split_group",
        metavar="NAME",
        help="column that says who acts, or a regular expression whose (group) does, of the path without its ending",
    )
    add("--validation_fraction", type=float, metavar="X", help="share of the groups (default 0.1, or the source's own)")
    add("--validation_groups", metavar="REGEX", help="hold out the groups that match, in place of a share")
    add("--label_column", metavar="NAME", help="column that becomes internal text; of sound also folder")
    add("--metres_per_unit", type=float, metavar="X", help="of a .bvh (default: guessed from the skeleton)")
    add("--license", metavar="TEXT", help="kept with every recording (default: as the folder states it)")
    arguments = parser.parse_args()
    for name in ("image_size", "image_rate", "metres_per_unit"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be above 0")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from dataclasses import fields

    from creature.data.recordings.importing import import_recordings
    from creature.data.recordings.sheet import draw_recordings
    from creature.data.recordings.sources import ImportOptions

    options = ImportOptions(**{field.name: getattr(arguments, field.name) for field in fields(ImportOptions)})
    facts = import_recordings(
        arguments.input,
        arguments.output,
        arguments.format,
        options,
        license=arguments.license,
        progress=sys.stderr.isatty(),
    )
    print(format_report(facts))
    print(f"\n{arguments.output}\n{draw_recordings(arguments.output)}")


def format_report(facts: dict) -> str:
    """The report of an import as a table of two columns."""
    report, rows = facts["report"], []
    for one in report["inputs"]:
        rows.append(("input", f"{one['source']} ({one['format']})"))
    for name, sums in report["splits"].items():
        rows.append((name, f"{sums['seconds'] / 60:,.1f} min, {sums['ticks']:,} ticks of 80 ms, "
                           f"{sums['recordings']:,} recordings, {sums['groups']:,} groups"))  # fmt: skip
    for name, column in report["columns"].items():
        values = facts["names"].get("joints" if name.startswith("joint_") else name)
        facts_of = [f"{column['recordings']:,} recordings"]
        facts_of += [f"{column['rate']:g} a second"] if "rate" in column else []
        facts_of += [f"{column['words']:,} words"] if "words" in column else []
        facts_of += [f"{len(values)} {'joints' if name.startswith('joint_') else 'numbers'}"] if values else []
        rows.append((name, f"{', '.join(facts_of)}: {column['feeds']}"))
    for title, notes in (("left out", report["left_out"]), ("note", report["remarks"])):
        for note in notes:
            more = ", ..." if note["count"] > len(note["examples"]) else ""
            rows.append((title, f"{note['count']:,} x {note['what']} ({', '.join(note['examples'])}{more})"))
    rows.append(("license", "; ".join(report["licenses"])))
    rows.append(("time", f"{report['seconds']:,.1f} s"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    run_main(main)
