"""What the report's figures are drawn of: marks, lines and texts as SVG elements.

Looks are in `assets/figure.css`, by class. Every text is escaped here, as are hints, which a
browser shows under the pointer.
"""

import math
from html import escape

RADIUS = 3.0  # of a point
SHAPES = ("circle", "square", "up", "down", "bar")


def mark(index: int, x: float, y: float, r: float, hint: str) -> str:
    """A prompt of a run: shape and colour say which run."""
    shape = SHAPES[index % len(SHAPES)]
    inside = title(hint)
    if shape == "circle":
        return f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}">{inside}</circle>'
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "up": [(0, -1.2), (1.1, 0.85), (-1.1, 0.85)],
        "down": [(0, 1.2), (1.1, -0.85), (-1.1, -0.85)],
        "bar": [(-1.2, -0.45), (1.2, -0.45), (1.2, 0.45), (-1.2, 0.45)],
    }[shape]
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
    return f'<polygon class="point" points="{points}">{inside}</polygon>'


def diamond(x: float, y: float, r: float, name: str, hint: str) -> str:
    points = f"{x:.1f},{y - r:.1f} {x + r:.1f},{y:.1f} {x:.1f},{y + r:.1f} {x - r:.1f},{y:.1f}"
    return f'<polygon class="{name}" points="{points}">{title(hint)}</polygon>'


def line(x1, y1, x2, y2, name: str, hint: str = "") -> str:
    ends = [value if isinstance(value, str) else f"{value:.1f}" for value in (x1, y1, x2, y2)]
    shape = '<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}">{}</line>'
    return shape.format(name, *ends, title(hint))


def title(hint: str) -> str:
    """What a browser shows under the pointer."""
    return f"<title>{escape(hint)}</title>" if hint else ""


def text(x, y: float, content: str, name: str) -> str:
    x = x if isinstance(x, str) else f"{x:.1f}"
    return f'<text class="{name}" x="{x}" y="{y:.1f}">{escape(content)}</text>'


def spread(heights: dict[str, float], most: float) -> dict[str, tuple[float, float]]:
    """Points moved sideways, as little as needed, until they no longer cover each other."""
    placed: list[tuple[float, float]] = []
    found = {}
    steps = [0.0]
    for number in range(1, 40):
        offset = number * RADIUS * 0.5
        if offset <= most:
            steps += [offset, -offset]
    for prompt in sorted(heights, key=lambda prompt: (heights[prompt], prompt)):
        height = heights[prompt]
        near = [point for point in placed if abs(point[1] - height) < 2 * RADIUS]

        def room(dx: float, near=near, height=height) -> float:
            return min((math.hypot(dx - x, height - y) for x, y in near), default=math.inf)

        free = [dx for dx in steps if room(dx) >= 2 * RADIUS]
        dx = free[0] if free else max(steps, key=room)
        placed.append((dx, height))
        found[prompt] = (dx, height)
    return found
