"""Minutes on two CPU cores: a model of what the clients of a bank do, whose states tell them apart.

Its 3,000 clients are made by a seed (embedded:table; what is planted in them is written in
plainllama/text/embedded_table.py, and `python -m plainllama.text.embedded_table labels.csv` writes
the labels, which nothing here reads). For clients of your own give a .csv or .parquet in sources.
"""

dataset = "transactions"
documents = "table"
sources = {
    "path": "embedded:table",
    "id": "client",  # rows come in any order: they are sorted by this
    "time": "date",  # and by this, which need not be shown: here it would be half of the text
    "columns": [
        {"column": "mcc", "name": "category", "words": {
            5411: "grocery", 5462: "bakery", 5541: "fuel", 7542: "car wash", 6011: "cash",
            5912: "pharmacy", 5812: "restaurant", 4111: "transport"}},
        {"column": "amount", "unit": "EUR", "decimals": 0},
    ],
}
tokenizer = "bpe:512"
val_fraction = 0.05

n_layer = 4
n_head = 4
d_model = 128
d_ff = 344
block_size = 1024

global_batch_tokens = 8 * 1024
max_steps = 130
optimizer = "muon"
learning_rate = 2.5e-3
min_lr = 0.0
schedule = "linear"
warmup_steps = 20

log_interval = 10
eval_interval = 65
eval_tokens = 16 * 1024
save_interval = 65
