"""The words, names, numbers and colours that the world is made of, and the combinations kept out of training."""

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 20),
    "purple": (136, 60, 180),
    "orange": (245, 130, 30),
    "black": (30, 30, 30),
    "white": (250, 250, 250),
    "gray": (140, 140, 140),
    "brown": (130, 80, 40),
    "pink": (245, 130, 180),
}
OBJECTS = (
    "ball", "star", "house", "tree", "fish", "boat", "cup", "kite",
    "square", "triangle", "heart", "moon", "arrow", "cross", "flag", "ring",
)  # fmt: skip
PLACES = (
    "top-left", "top", "top-right",
    "left", "center", "right",
    "bottom-left", "bottom", "bottom-right",
)  # fmt: skip

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
YEARS = tuple(str(year) for year in range(2015, 2027))
NAMES = (
    "Anna", "Ben", "Carl", "Dora", "Emma", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kate", "Leo", "Mia", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tom", "Vera", "Will", "Zoe", "Alice", "David", "Laura", "Peter",
)  # fmt: skip
CITIES = (
    "Rome", "Paris", "Oslo", "Bern", "Lima", "Cairo", "Delhi", "Tokyo", "Milan", "Lyon", "Kiev", "Seoul", "Doha",
    "Riga", "Porto", "Turin", "Quito", "Perth", "Boston", "Dallas", "London", "Berlin", "Madrid", "Vienna",
)  # fmt: skip
COUNTRIES = ("Italy", "Spain", "Peru", "Chile", "Japan", "India", "China", "Kenya", "Egypt", "Cuba", "Iran", "Nepal")
ITEMS = (
    "tea", "milk", "jam", "ham", "rice", "soup", "cake", "fish", "corn", "pear", "plum", "salt", "bread", "apple",
    "lemon", "grape", "melon", "beans", "pasta", "pizza", "juice", "water", "honey", "sugar", "eggs", "nuts",
    "onion", "olive", "peach", "beer", "wine", "cocoa", "steak", "salad", "butter", "coffee",
)  # fmt: skip
ANIMALS = ("cat", "dog", "cow", "pig", "hen", "duck", "goat", "horse", "sheep", "bear", "wolf", "lion", "tiger", "frog")
SPORTS = ("golf", "tennis", "judo", "chess", "rugby", "polo", "yoga", "dance", "rowing", "skiing", "boxing", "cricket")
VEHICLES = ("car", "bus", "train", "bike", "tram", "ship", "plane", "truck", "van", "taxi")

TITLES = (
    "Sales", "Rain", "Visits", "Votes", "Goals", "Points", "Profit", "Orders", "Users", "Trips", "Hours", "Score",
    "Output", "Stock", "Costs", "Income",
)  # fmt: skip
SHOPS = ("MARKET", "BAKERY", "DELI", "STORE", "KIOSK", "GROCER", "BISTRO", "DINER", "CORNER", "FRESH")
SIGNS = (
    "STOP", "EXIT", "OPEN", "SALE", "TAXI", "BANK", "CAFE", "SHOP", "PARK", "HOTEL", "BUS", "POST",
    "ZOO", "GYM", "BAR", "PUSH", "PULL", "FIRE", "LIFT", "TRAM", "FARM", "CITY", "LAKE", "TOLL",
    "SLOW", "CLOSED", "POLICE", "METRO", "ENTRY", "MUSEUM", "SCHOOL", "BEACH", "FERRY", "WAIT", "DANGER", "POOL",
)  # fmt: skip
BOOK_WORDS = (
    "River", "Night", "Storm", "Garden", "Winter", "Island", "Secret", "Silver", "Shadow", "Bridge", "Forest",
    "Summer", "Desert", "Castle", "Mirror", "Letter", "Harbor", "Window",
)  # fmt: skip
FIELDS = ("Name", "City", "Age", "Sport", "Pet", "Country", "Room", "Seat", "Day", "Month")
KEYS = ("title", "shop", "cover", "author", "year")  # of facts, where the picture prints only the value
LETTERS = tuple("ABCDEFGHJKLMNPRSTUVWXYZ")

NUMBERS = tuple(str(number) for number in range(101))
WORDS = tuple(
    dict.fromkeys(
        (
            *COLORS, *OBJECTS, *PLACES, *MONTHS, *DAYS, *YEARS, *NAMES, *CITIES, *COUNTRIES, *ITEMS, *ANIMALS,
            *SPORTS, *VEHICLES, *TITLES, *SHOPS, *SIGNS, *BOOK_WORDS, *FIELDS, *KEYS, *LETTERS, *NUMBERS,
        )
    )
)  # fmt: skip

# Combinations that no training picture shows: they make up the `combinations` split.
HELD_OUT_OBJECTS = frozenset(
    {("red", "star"), ("blue", "tree"), ("green", "cup"), ("yellow", "boat"), ("pink", "moon")}
)
HELD_OUT_SIGNS = frozenset({"LAKE", "TOLL", "FERRY"})
HELD_OUT_SERIES = frozenset({("animals", 3), ("months", 4), ("cities", 2)})  # what a chart is about, and how many bars
HELD_OUT_FIELDS = frozenset({("Name", "Room"), ("City", "Age")})  # on one form
