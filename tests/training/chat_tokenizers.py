"""Small Hugging Face tokenizers with chat templates, made without any download."""

from __future__ import annotations

from pathlib import Path

QWEN_LIKE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of the same behaviour as Qwen2-VL's: a default system message, content as a string or as parts."""
TEXT_ONLY = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'].strip() }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LLAMA_LIKE = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Of the same layout as Llama 3's, without its first token."""
THOUGHTFUL = (
    "{% set last = namespace(question=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set said = m['content'].split('</think>') %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 > last.question %}"
    "<think>\n{{ said[0].split('<think>')[-1].strip() if said|length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ said[-1].strip() if m['role'] == 'assistant' else m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of the same behaviour as Qwen3's: thoughts stand before the last answer, empty where there are none, and nowhere else."""
VISION_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def save_tokenizer(folder: Path, template: str | None, special: list[str]) -> str:
    """A byte-level BPE tokenizer with a few merges, as a Hugging Face directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Which bar is the tallest? March user assistant system"] * 9, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token="<s>"
    )
    fast.add_tokens(special, special_tokens=True)
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)
