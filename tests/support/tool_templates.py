"""Chat templates in the manner of families that were trained with tools: short, with their marks and quirks."""

from __future__ import annotations

_CHATML_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_CHATML_TURNS = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant\n' + m.content }}"
    "{% for call in m.tool_calls %}{% set call = call.function %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}{{ call.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role != 'system' or not loop.first %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
_CHATML_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% else %}{% set system = 'You are helpful.' %}{% endif %}"
    "{{ '<|im_start|>system\n' + system }}"
    "{% if tools %}{{ '\n\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\n</tools>\nAnswer with <tool_call></tool_call>.' }}{% endif %}{{ '<|im_end|>\n' }}"
)
QWEN = _CHATML_SYSTEM + _CHATML_TURNS + _CHATML_END
# Reasons unless it is told not to.
QWEN3 = QWEN.replace(
    _CHATML_END,
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}",
)
OPENS_THINKING = QWEN.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
KNOWS_EFFORT = "{{ '<effort>' + reasoning_effort | default('medium') }}" + QWEN
# Calls are elements of XML, and so are the tools; arguments are written as they are or, if they are no texts, as JSON.
QWEN3_CODER = (
    _CHATML_SYSTEM.replace(
        "Answer with <tool_call></tool_call>.",
        "Answer with <tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>.",
    )
    + _CHATML_TURNS.replace(
        '{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}{{ call.arguments | tojson }}'
        "{{ '}\n</tool_call>' }}",
        "{{ '\n<tool_call>\n<function=' + call.name + '>\n' }}"
        "{% for key, value in call.arguments | items %}{{ '<parameter=' + key + '>\n' }}"
        "{{ value if value is string else value | tojson }}{{ '\n</parameter>\n' }}{% endfor %}"
        "{{ '</function>\n</tool_call>' }}",
    )
    + _CHATML_END
)
# Tools stand in the first user's turn, the system turn changes with them, and a turn has one call.
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}"
    "{{ system + '<|eot_id|>' }}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{ {'output': m.content} | tojson }}{{ '<|eot_id|>' }}"
    "{% elif 'tool_calls' in m %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}"
    "{% endif %}{% set call = m.tool_calls[0].function %}"
    '{{ \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.first %}"
    '{{ \'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. \' }}'
    "{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endif %}"
    "{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PYTHONIC = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{% if tools %}{{ 'Respond in the format [func_name1(params_name1=params_value1, ...)]\n' }}"
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|eot_id|>' }}{% for m in messages %}"
    "{% if 'tool_calls' in m %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n[' }}{% for call in m.tool_calls %}"
    "{{ call.function.name + '(' }}{% for name in call.function.arguments %}"
    "{{ name + '=' + call.function.arguments[name] | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}{{ ')' }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}{{ ']<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Wants ids of nine characters, and turns that alternate; the last user's turn has the tools.
_MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}"
    "{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls is defined %}CALLS{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
MISTRAL_LIST = _MISTRAL.replace(
    "CALLS",
    "{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]",
)
MISTRAL = _MISTRAL.replace(
    "CALLS",
    "{% for call in m.tool_calls %}"
    "{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}{{ call.function.arguments | tojson }}{% endfor %}",
)
# No system turns, turns that alternate, and not a word of tools.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
FUNCTIONGEMMA = (
    "{{ bos_token + '<start_of_turn>developer\n' }}{% for t in tools or [] %}"
    "{{ '<start_function_declaration>declaration:' + t.function.name + '<end_function_declaration>' }}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% for m in messages %}{% if m.tool_calls %}{{ '<start_of_turn>model\n' }}"
    "{% for call in m.tool_calls %}{{ '<start_function_call>call:' + call.function.name + '{' }}"
    "{% for key, value in call.function.arguments.items() %}"
    "{{ key + ':<escape>' }}{{ value }}{{ '<escape>' }}{% endfor %}"
    "{{ '}<end_function_call>' }}{% endfor %}"
    "{% else %}{{ '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Calls in a form of its own, with arguments as text, and tools nowhere.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ '<call>' + call.function.name + '```json\n' + call.function.arguments + '\n```' }}{% endfor %}"
    "{% else %}{{ '<' + m.role + '>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + _CHATML_END
)
TOOL_TEMPLATES = {
    "qwen": QWEN,
    "qwen3": QWEN3,
    "qwen3_coder": QWEN3_CODER,
    "opens thinking": OPENS_THINKING,
    "llama3": LLAMA3,
    "pythonic": PYTHONIC,
    "mistral": MISTRAL,
    "mistral_list": MISTRAL_LIST,
    "gemma": GEMMA,
    "functiongemma": FUNCTIONGEMMA,
    "deepseek": DEEPSEEK,
    "chatml": CHATML,
}
