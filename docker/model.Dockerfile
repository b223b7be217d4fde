# A bundle as an OCI image for k8s/components/model-from-image. Its root is a store; the tag names the version.
#   docker/engine build -f docker/model.Dockerfile -t registry.example.com/imago-model:digits-1 \
#     --build-arg NAME=digits --build-arg NUMBER=1 artifacts/store
FROM scratch
ARG NAME NUMBER
COPY ${NAME}/${NUMBER} /${NAME}/${NUMBER}
