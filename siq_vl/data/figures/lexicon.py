"""The words, colours and numbers that drawn figures are made of, and the combinations kept out of training."""

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 20),
    "purple": (136, 60, 180),
    "orange": (245, 130, 30),
    "black": (30, 30, 30),
}
OBJECTS = ("ball", "star", "house", "tree", "fish", "boat", "cup", "kite")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
ITEMS = ("tea", "milk", "jam", "ham", "rice", "soup", "cake", "fish", "corn", "pear", "plum", "salt")
SIGNS = (
    "STOP", "EXIT", "OPEN", "SALE", "TAXI", "BANK", "CAFE", "SHOP", "PARK", "HOTEL", "BUS", "POST",
    "ZOO", "GYM", "BAR", "PUSH", "PULL", "FIRE", "LIFT", "TRAM", "FARM", "CITY", "LAKE", "TOLL",
)  # fmt: skip
LETTERS = tuple("ABCDEFGHJKLMNPRSTUVWXYZ")
WORDS = tuple(
    dict.fromkeys(
        (*COLORS, *OBJECTS, *PLACES, *MONTHS, *ITEMS, *SIGNS, *LETTERS, *(str(number) for number in range(100)))
    )
)

# Combinations that no training picture shows: they make up the `combinations` split.
HELD_OUT_OBJECTS = frozenset({("red", "star"), ("blue", "tree"), ("green", "cup"), ("yellow", "boat")})
HELD_OUT_SIGNS = frozenset({"LAKE", "TOLL"})
HELD_OUT_SERIES_COUNT = 3
