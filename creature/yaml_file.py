"""Reading a YAML file of settings that may be damaged or hostile: bounded, without aliases and without double keys."""

import re
from pathlib import Path
from typing import Any

import yaml

from creature.errors import UserError, first_line

LARGEST_CONFIG = 1 << 20  # bytes


class _UniqueKeyLoader(yaml.SafeLoader):
    """
    A safe YAML loader that refuses a key written twice (the first value would be lost in silence) and aliases, by which
    a few lines stand for more than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"write out what *{event.anchor} means", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-5 for text, because it has no point.
NUMBER = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_UniqueKeyLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """What a YAML text says, in plain Python types; YAMLError where it is not valid."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except ValueError as error:
        raise yaml.YAMLError(first_line(error)) from error
    except (TypeError, LookupError, AttributeError) as error:  # raised by readers of tags: `!!int ''`, `!!bool maybe`
        raise yaml.YAMLError("a value is not what its tag says") from error


def load_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file; UserError where the file is missing, is not text or is not a mapping."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_CONFIG + 1)
        if len(data) > LARGEST_CONFIG:
            raise UserError(f"{path} has more than {LARGEST_CONFIG >> 20} MiB: --config takes a YAML file of settings")
        content = parse_yaml(data.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}: the project's configs/ has examples") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: --config takes a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save the configuration as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}{where} is not valid YAML ({problem}): correct it there") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping with the sections model, data, training")
    return content
