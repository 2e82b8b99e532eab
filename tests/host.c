/* A host as an editor is one: opens a script through VSScript, asks for frames out of order, reloads, frees.

   host SCRIPT RELOADS FRAME...   prints, for every load, a line "load I rss KIB" and lines "FRAME HASH". */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "VSScript4.h"

static long resident(void) {
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file && fscanf(file, "%*s %ld", &pages) != 1) pages = 0;
    if (file) fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static uint64_t hash(const VSAPI *api, const VSFrame *frame) {
    const VSVideoFormat *format = api->getVideoFrameFormat(frame);
    uint64_t value = 14695981039346656037ull;
    for (int plane = 0; plane < format->numPlanes; plane++) {
        const uint8_t *row = api->getReadPtr(frame, plane);
        size_t bytes = (size_t)api->getFrameWidth(frame, plane) * format->bytesPerSample;
        for (int y = 0; y < api->getFrameHeight(frame, plane); y++, row += api->getStride(frame, plane))
            for (size_t x = 0; x < bytes; x++) value = (value ^ row[x]) * 1099511628211ull;
    }
    return value;
}

int main(int count, char **arguments) {
    const VSSCRIPTAPI *scripts = getVSScriptAPI(VSSCRIPT_API_VERSION);
    if (!scripts || count < 4) return 2;
    const VSAPI *api = scripts->getVSAPI(VAPOURSYNTH_API_VERSION);
    int loads = atoi(arguments[2]);
    for (int load = 0; load < loads; load++) {
        VSScript *script = scripts->createScript(NULL);
        if (scripts->evaluateFile(script, arguments[1])) {
            fprintf(stderr, "%s\n", scripts->getError(script));
            return 3;
        }
        VSNode *node = scripts->getOutputNode(script, 0);
        for (int i = 3; i < count; i++) {
            char message[1024];
            const VSFrame *frame = api->getFrame(atoi(arguments[i]), node, message, sizeof(message));
            if (!frame) {
                fprintf(stderr, "%s\n", message);
                return 4;
            }
            printf("%s %016llx\n", arguments[i], (unsigned long long)hash(api, frame));
            api->freeFrame(frame);
        }
        api->freeNode(node);
        scripts->freeScript(script);
        printf("load %d rss %ld\n", load, resident());
        fflush(stdout);
    }
    return 0;
}
