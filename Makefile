.PHONY: protos
PROTOS := $(shell find protos -name '*.proto')

protos: ## Generate the stubs from protos/
	.tools/bin/python -m grpc_tools.protoc -Iprotos --plugin=protoc-gen-mypy=.tools/bin/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=.tools/bin/protoc-gen-mypy_grpc --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. $(PROTOS)
