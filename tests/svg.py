"""What the plots' SVGs hold."""

from xml.etree.ElementTree import Element, fromstring


def number_of_points(line: Element) -> int:
    """Return how many points the line of a group goes through."""
    path = next(element for element in line.iter() if element.tag.endswith("path"))
    return sum(command in "ML" for command in path.get("d"))


def points_in(svg: str, colour: str) -> list[tuple[float, float]]:
    """Return the points of the one line that is drawn in a colour, x to the right and y downwards; no legend has any."""
    lines = [
        element
        for element in fromstring(svg).iter()
        if element.tag.endswith("path") and element.get("clip-path") and f"stroke: {colour};" in element.get("style")
    ]
    (line,) = lines
    return [tuple(map(float, point.split())) for point in line.get("d").replace("M", "L").split("L")[1:]]
