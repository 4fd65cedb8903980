import json
from tokenizers import Tokenizer
def test_dump(llm):
    t = llm.get_tokenizer()
    c = json.loads(t.backend_tokenizer.to_str()); c.pop("truncation"); c.pop("padding")
    d = json.loads(open(llm.llm_engine.model_config.model + "/tokenizer.json").read()); d.pop("truncation"); d.pop("padding")
    def diff(a,b,path=""):
        if type(a)!=type(b): print("DIFF",path,a,b); return
        if isinstance(a,dict):
            for k in set(a)|set(b): diff(a.get(k),b.get(k),path+"/"+str(k))
        elif isinstance(a,list):
            if len(a)!=len(b): print("DIFF",path,len(a),len(b)); return
            for i,(x,y) in enumerate(zip(a,b)): diff(x,y,path+f"[{i}]")
        elif a!=b: print("DIFF",path,a,b)
    diff(c,d)
    from vllm.score.perplexity.identity import describe_tokenizer
    print("DIFF", describe_tokenizer(t), t.bos_token_id, t.eos_token_id, list(c))
    from transformers import AutoTokenizer
    print("DIFF", describe_tokenizer(AutoTokenizer.from_pretrained(llm.llm_engine.model_config.model)))
