"""The words of the little language that `embedded:tiny` speaks.

Owns the word lists and what is true of the things in them (what an animal eats, what a machine needs). Knows no grammar.
"""

GIRLS = "Nora Mia Ada Ruth Lena Vera Sofia Priya Amina Ines Freya Yuki".split()
BOYS = "Tom Leo Omar Finn Hugo Ravi Emil Jonas Kofi Pablo Sven Kenji".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = ["spring", "summer", "autumn", "winter"]
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
           "eighteen nineteen twenty").split()
COLOURS = "red blue green yellow white black brown grey orange".split()
SIZES = "small big old new heavy light long short round flat".split()
FEELINGS = ["happy", "tired", "proud", "calm", "curious", "worried", "hungry", "thirsty", "glad", "sleepy", "brave", "shy"]
FAMILY = ["mother", "father", "sister", "brother", "aunt", "uncle", "grandmother", "grandfather", "cousin", "friend", "neighbour"]
JOBS = "baker farmer teacher doctor driver sailor builder painter gardener engineer miller nurse".split()

# name, where it is, what is seen there
PLACES = [
    ("river", "by", ["a boat", "tall grass", "smooth stones", "a wooden bridge"]),
    ("forest", "in", ["old trees", "a narrow path", "mushrooms", "a fallen branch"]),
    ("market", "at", ["fresh bread", "a row of baskets", "loud voices", "sweet plums"]),
    ("harbour", "in", ["a ship", "wet nets", "a lighthouse", "a heap of rope"]),
    ("farm", "on", ["a barn", "a red tractor", "a field of wheat", "a muddy gate"]),
    ("village", "in", ["a stone well", "a small shop", "a quiet street", "a clock tower"]),
    ("hill", "on", ["a windmill", "a long fence", "yellow flowers", "a flat rock"]),
    ("lake", "by", ["thin ice", "a blue tent", "two swans", "a fishing pole"]),
    ("valley", "in", ["a railway", "green fields", "a stream", "a narrow road"]),
    ("school", "at", ["a big map", "a row of desks", "a bell", "a shelf of books"]),
    ("station", "at", ["a late train", "a long bench", "a crowd", "a ticket window"]),
    ("island", "on", ["white sand", "a cave", "palm trees", "a broken boat"]),
    ("mill", "at", ["sacks of flour", "a turning wheel", "dust in the light", "a heavy stone"]),
    ("beach", "on", ["shells", "a sleeping dog", "a kite", "small waves"]),
]
ROOMS = ["kitchen", "garage", "attic", "cellar", "office", "library", "bathroom", "bedroom", "workshop", "hall", "barn", "studio"]
OBJECTS_AT_HOME = ["table", "chair", "shelf", "window", "door", "bed", "box", "drawer", "basket", "floor"]

# weather word, what it does
WEATHER = [
    ("sunny", "the light was warm"), ("rainy", "the paths were wet"), ("windy", "the leaves flew about"),
    ("cold", "the puddles were frozen"), ("foggy", "nobody could see the hill"), ("cloudy", "the sky was low and grey"),
    ("stormy", "the windows shook"), ("snowy", "the roofs were white"), ("hot", "everyone looked for shade"),
    ("mild", "the air was soft"),
]
FOODS = ["bread", "soup", "cheese", "rice", "apples", "pears", "plums", "carrots", "potatoes", "beans", "honey", "eggs", "fish",
         "onions", "tea", "milk", "cake", "nuts", "butter", "salad"]
COUNTED = ["apples", "pears", "plums", "eggs", "nuts", "stones", "books", "coins", "shells", "cups", "candles", "tickets",
           "pencils", "buttons", "lamps", "boxes"]
SOUPS = [("carrot", "carrots"), ("potato", "potatoes"), ("onion", "onions"), ("bean", "beans"), ("fish", "fish")]

# name, where it lives, what it eats, sound, young
ANIMALS = [
    ("cow", "on a farm", "grass", "moos", "calf"), ("dog", "in a house", "meat", "barks", "puppy"),
    ("cat", "in a house", "fish", "purrs", "kitten"), ("goat", "on a hill", "leaves", "bleats", "kid"),
    ("horse", "in a stable", "hay", "neighs", "foal"), ("owl", "in the forest", "mice", "hoots", "chick"),
    ("duck", "on the lake", "seeds", "quacks", "duckling"), ("bee", "in a hive", "nectar", "hums", "larva"),
    ("fox", "in the forest", "berries", "yelps", "cub"), ("frog", "by the river", "flies", "croaks", "tadpole"),
    ("sheep", "in the valley", "clover", "bleats", "lamb"), ("hen", "in a barn", "corn", "clucks", "chick"),
    ("wolf", "in the mountains", "meat", "howls", "pup"), ("crow", "in the trees", "worms", "caws", "chick"),
]
# tool, what it does, what it is made of
TOOLS = [
    ("hammer", "drive nails", "steel and wood"), ("saw", "cut wood", "steel"), ("rope", "tie things", "hemp"),
    ("ladder", "climb up", "wood"), ("shovel", "dig holes", "iron and wood"), ("needle", "sew cloth", "steel"),
    ("bucket", "carry water", "tin"), ("brush", "paint walls", "hair and wood"), ("wrench", "turn bolts", "steel"),
    ("knife", "cut bread", "steel"), ("map", "find the way", "paper"), ("lantern", "see in the dark", "tin and glass"),
    ("broom", "sweep the floor", "straw"), ("net", "catch fish", "string"), ("compass", "find north", "brass"),
]
# machine, what it does
MACHINES = [
    ("kettle", "boils water"), ("heater", "warms a room"), ("oven", "bakes bread"), ("pump", "lifts water"),
    ("fan", "moves air"), ("dryer", "dries clothes"), ("washer", "cleans clothes"), ("toaster", "browns bread"),
    ("mixer", "stirs dough"), ("printer", "prints pages"), ("computer", "counts and stores"), ("fridge", "keeps food cold"),
    ("boiler", "heats water"), ("drill", "makes holes"), ("lathe", "shapes wood"), ("charger", "fills batteries"),
    ("welder", "joins steel"), ("cooler", "cools a room"), ("press", "squeezes fruit"), ("furnace", "melts metal"),
]
# source, where the energy comes from, when it is strong, when it is weak
SOURCES = [
    ("solar panel", "the sun", "at noon in summer", "at night"), ("wind turbine", "the wind", "in a storm", "on a calm day"),
    ("water wheel", "the river", "after the rain", "in a dry month"),
    ("wave machine", "the sea", "on a rough day", "on a flat sea"),
    ("tide gate", "the tide", "when the moon is full", "between the tides"),
    ("wood stove", "burning wood", "with dry wood", "with wet wood"),
]
SAVINGS = [
    ("turned off the lamp", "nobody was reading"), ("closed the window", "the heater was on"),
    ("put a lid on the pot", "the soup was hot"),
    ("dried the shirts outside", "the sun was strong"), ("took the train", "the car was not needed"),
    ("mended the old coat", "a new one takes energy to make"),
    ("switched off the computer", "the work was done"), ("filled the washer to the top", "half a load wastes water"),
    ("let the fridge door shut", "cold air was falling out"), ("put wool in the roof", "warm air rises"),
]
LOST = ["key", "hat", "coin", "book", "glove", "ring", "ticket", "letter", "scarf", "ball"]
BROKEN = [("gate", "hammer"), ("fence", "saw"), ("boat", "rope"), ("pump", "wrench"), ("roof", "ladder"), ("shirt", "needle"),
          ("bicycle", "wrench"), ("wall", "brush"), ("drain", "shovel"), ("sail", "needle")]
# adjective, its opposite
OPPOSITES = [("hot", "cold"), ("big", "small"), ("old", "new"), ("wet", "dry"), ("heavy", "light"), ("long", "short"),
             ("fast", "slow"),
             ("high", "low"), ("full", "empty"), ("loud", "quiet"), ("open", "shut"), ("strong", "weak"), ("bright", "dark"),
             ("soft", "hard")]
PROVERBS = ["A little saved each day is a lot in a year.", "Slow work is good work.", "Many hands make a short day.",
            "Measure twice and cut once.", "What is shared is not lost.", "After the rain comes the sun.",
            "A small lamp is enough for a small room.", "He who asks finds the way."]
