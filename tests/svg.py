"""What the plots' SVGs hold."""

from xml.etree.ElementTree import Element


def number_of_points(line: Element) -> int:
    """Return how many points the line of a group goes through."""
    path = next(element for element in line.iter() if element.tag.endswith("path"))
    return sum(command in "ML" for command in path.get("d"))
